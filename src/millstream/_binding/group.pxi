# ms_group.h: a group file as this process has mapped it
cdef extern from "ms_group.h" nogil:
    enum:
        MS_GROUP_LEAVING
        MS_GROUP_MEMBERS
    ctypedef struct ms_group_header:
        uint64_t group_id
        uint32_t state
        uint32_t poison
        uint64_t generation
        uint32_t partitions
        uint32_t changes
        uint32_t word
        uint32_t sync
        uint64_t sync_begun
        uint64_t sync_ended
    ctypedef struct ms_group_member:
        uint32_t process
        uint32_t number
        uint64_t session
        uint64_t processing
        int64_t joined
    ctypedef struct ms_group:
        ms_group_header *header
        ms_group_member *members
        uint32_t room
        uint32_t self
        uint64_t generation
    ctypedef struct ms_group_position:
        uint64_t epoch
        uint64_t offset
        uint64_t transaction
    ctypedef struct ms_group_claim:
        uint32_t slot
        uint32_t partition
        uint64_t fence
    uint64_t ms_group_size(uint32_t partitions)
    void ms_group_init(void *bytes, const uint8_t *store_id, uint64_t stream_id, uint64_t group_id,
                       uint64_t salt, uint64_t generation, uint32_t partitions)
    ms_status ms_group_attach(ms_group *group, void *bytes, uint64_t size, const uint8_t *store_id,
                              uint64_t stream_id, ms_error *err)
    void ms_group_void(ms_group *group)
    ms_status ms_group_take_over(ms_group *group, uint32_t dead, uint32_t *out_owner)
    ms_status ms_group_try_join(ms_group *group, uint64_t session, uint64_t processing,
                                uint32_t *out_slot, uint32_t *out_number, uint32_t *out_owner)
    ms_status ms_group_try_leave(ms_group *group, uint32_t slot, uint32_t number,
                                 uint32_t *out_owner)
    ms_status ms_group_try_take_up(ms_group *group, uint32_t slot, uint32_t number,
                                uint64_t *out_fences, uint8_t *out_flags, uint32_t count,
                                uint32_t *out_changes, uint32_t *out_owner)
    ms_status ms_group_try_release(ms_group *group, const ms_group_claim *claim,
                                   uint32_t *out_owner)
    ms_status ms_group_try_end(ms_group *group, uint64_t now_ns, const uint32_t *dead,
                               uint32_t dead_count, uint32_t *out_ended, uint32_t *out_owner)
    bint ms_group_claim_watch(ms_group *group, uint64_t now_ns, uint64_t interval_ns)
    bint ms_group_overdue(const ms_group *group, uint64_t now_ns)
    ms_status ms_group_renew(void *deadline, uint64_t *io_token, uint64_t to)
    ms_status ms_group_try_grow(ms_group *group, uint32_t partitions, uint32_t *out_owner)
    ms_status ms_group_position_of(const ms_group *group, uint32_t partition,
                                   ms_group_position *out)
    ms_status ms_group_try_commit(ms_group *group, const ms_group_claim *claim, uint64_t epoch,
                                  uint64_t offset, cbool backwards, uint32_t *out_owner)
    ms_status ms_group_try_seek(ms_group *group, uint32_t partition, uint64_t epoch,
                                uint64_t offset, uint32_t *out_owner)
    ms_status ms_group_try_prepare(ms_group *group, uint64_t transaction,
                                   const ms_group_claim *claims,
                                   const ms_group_position *positions, uint32_t count,
                                   uint32_t *out_owner)
    ms_status ms_group_pending(const ms_group *group, uint32_t partition,
                               uint64_t *out_transaction, uint64_t *out_fence,
                               ms_group_position *out)
    ms_status ms_group_try_apply(ms_group *group, uint32_t partition, uint64_t transaction,
                                 uint64_t epoch, uint64_t offset, uint32_t *out_owner)
    ms_status ms_group_try_revert(ms_group *group, uint32_t partition, uint64_t transaction,
                                  uint32_t *out_owner)
    ms_status ms_group_try_drop(ms_group *group, uint32_t *out_owner)
    void ms_group_holder(const ms_group *group, uint32_t partition, uint32_t *out_slot,
                         uint64_t *out_fence, cbool *out_taken)
    bint ms_group_check(const ms_group *group, char *text, size_t size)

cdef enum:
    GROUP_LIVE = 1
    GROUP_LOCK_NS = 30000000000
    WATCH_NS = 40000000  # how often somebody watches for the dead
    GROUP_MEMBERS_MOST = 256

GROUP_MEMBERS = MS_GROUP_MEMBERS


def group_size(uint32_t partitions):
    """Bytes of a group file for so many partitions."""
    return ms_group_size(partitions)


def group_init(memory, bytes store_id, uint64_t stream_id, uint64_t group_id, uint64_t salt,
               uint64_t generation, uint32_t partitions):
    """Make a group file of zeros in memory."""
    cdef _ControlBuffer buffer = hold_control(memory)
    ms_group_init(buffer.buffer.buf, <const uint8_t *>PyBytes_AS_STRING(store_id), stream_id,
                  group_id, salt, generation, partitions)


cdef class GroupCore:
    """A group file as mapped.

    Hooks of the subclass: ``_check_live()``, ``_check_writable()``, ``_map_again()``,
    ``_changed()``, ``_leave_to_background()``, ``_await_log(partition, offset)``,
    ``_make_durable()``,
    ``_damaged(partition)``, ``path``.
    """
    cdef ms_group c
    cdef list keep
    cdef object members
    cdef bint writable
    cdef bint is_closed
    cdef bint changed
    cdef int64_t unsynced_ns  # since when a change of this process waits for a sync; 0: none does
    cdef uint32_t fork
    cdef int level

    # --- what the subclass builds on --------------------------------------------------------------

    def _attach(self, map, bytes store_id, uint64_t stream_id, uint64_t generation, members,
                bint writable):
        """Use this map. What was mapped before stays, for threads that are still in it."""
        cdef ms_error err
        cdef ms_group c
        cdef _ControlBuffer buffer = hold_control(map)
        cdef ms_status status = ms_group_attach(
            &c, buffer.buffer.buf, <uint64_t>buffer.buffer.len,
            <const uint8_t *>PyBytes_AS_STRING(store_id), stream_id, &err)
        if status < 0:
            fail(status, &err, self.path)
        if self.keep is None:
            self.keep = []
            self.fork = ms_fork_count()
        self.keep.append(buffer)
        c.self = members.word if writable else 0
        c.generation = generation
        self.c = c
        self.members = members
        self.writable = writable

    def _configure_level(self, str durability):
        self.level = LEVELS[durability]

    cdef int changes(self) except -1:
        return must_write(self.writable, self.path)

    def _void(self):
        """End the memberships of an earlier generation. Nobody else has the group meanwhile."""
        self.changes()
        ms_group_void(&self.c)

    def _close(self):
        self.is_closed = True

    @property
    def closed(self):
        """Is the handle closed?"""
        return self.is_closed or self.fork != ms_fork_count()

    @property
    def _state(self):
        return ms_load32(&self.c.header.state)

    @property
    def _group_id(self):
        return self.c.header.group_id

    @property
    def _generation(self):
        return ms_load64(&self.c.header.generation)

    @property
    def _partitions(self):
        return ms_load32(&self.c.header.partitions)

    @property
    def _room(self):
        return self.c.room

    @property
    def _word_owner(self):
        return ms_load32(&self.c.header.word) & 0x7fffffff

    @property
    def _poison(self):
        return ms_load32(&self.c.header.poison)

    def _set_poison(self, uint32_t poison):
        self.changes()
        ms_store32(&self.c.header.poison, poison)

    def _sync_word(self, str what, double timeout):
        return make_word(&self.c.header.sync, self, self.members, what, timeout,
                         f"{self.path}: the sync word")

    @property
    def _syncs(self):
        """(syncs begun, the last that ended well)."""
        return ms_load64(&self.c.header.sync_begun), ms_load64(&self.c.header.sync_ended)

    def _begin_sync(self):
        """Number of the sync that begins now. Holder of the sync word."""
        self.changes()
        cdef uint64_t number = ms_load64(&self.c.header.sync_begun) + 1
        ms_store64(&self.c.header.sync_begun, number)
        ms_fence()
        return number

    def _end_sync(self, uint64_t number):
        self.changes()
        if ms_load64(&self.c.header.sync_ended) < number:  # or one within it has ended
            ms_store64(&self.c.header.sync_ended, number)

    def _take_changed(self):
        """Did this process change a position since the last call?"""
        cdef bint found = self.changed
        self.changed = False
        return found

    def _give_back_changed(self):
        """What was taken is not synced."""
        self.changed = True

    def _synced(self, int64_t began_ns):
        """A sync that began then has ended well."""
        if self.unsynced_ns <= began_ns:
            self.unsynced_ns = began_ns if self.changed else 0

    @property
    def _unsynced_seconds(self):
        """For how long a change of this process has waited for a sync."""
        cdef int64_t since = self.unsynced_ns
        return (ms_clock_monotonic_ns() - since) / 1e9 if since else 0.0

    cdef inline int alive(self) except -1:
        if self.is_closed or self.fork != ms_fork_count() or not self.writable or \
                ms_load32(&self.c.header.state) != GROUP_LIVE or \
                ms_load32(&self.c.header.poison) != 0:
            self._check_writable()
        return 0

    cdef inline int sync_change(self, int64_t now_ns) except -1:
        """A position was changed: sync it as the level says. An error says `Indeterminate`."""
        if self.level == 2:
            self.make_durable()
        elif not self.changed or (self.level == 1 and now_ns - self.unsynced_ns > <int64_t>LATE_NS):
            self.changed = True
            if self.unsynced_ns == 0:
                self.unsynced_ns = now_ns
            try:
                self._changed()
            except BaseException as error:
                raise self.uncertain(error)
        return 0

    cdef int make_durable(self) except -1:
        try:
            self._make_durable()
        except BaseException as error:
            raise self.uncertain(error)
        return 0

    cdef object uncertain(self, object error):
        """What to raise where `error` came behind a change."""
        self.changed = True
        self._leave_to_background()
        self.changed = False  # the next change is news again
        return _errors.indeterminate(
            error, "the position is stored, but whether it survives a power cut is not known",
            self.path)

    cdef int again(self, ms_status status, uint32_t owner, int64_t *deadline) except -1:
        """Is the call to be made again? What stood in its way is out of it then."""
        cdef int64_t left
        if status == MS_MOVED:
            self._map_again()
            return True
        if status == MS_CLOSED:
            self._check_live()  # raises
        if status != MS_BUSY:
            return False
        if deadline[0] == 0:
            deadline[0] = ms_clock_monotonic_ns() + GROUP_LOCK_NS
        left = deadline[0] - ms_clock_monotonic_ns()
        with nogil:
            status = ms_owner_wait(&self.c.header.word, self.c.self, left if left > 0 else 0,
                                   &owner)
        if status == MS_OK:
            ms_owner_release(&self.c.header.word)
            return True
        PyErr_CheckSignals()
        if self.members.is_dead(owner):
            if ms_group_take_over(&self.c, owner, &owner) != MS_OK:
                return True  # another was faster
        elif left <= 0:
            raise _errors.LockTimeout(
                f"{self.path}: the word of the group is held by {self.members.describe(owner)}")
        return True

    # --- reading ----------------------------------------------------------------------------------

    def _position(self, uint32_t partition):
        """(epoch, offset, transaction) of a partition, or None: from the oldest record on."""
        cdef ms_group_position found
        cdef ms_status status = ms_group_position_of(&self.c, partition, &found)
        if status == MS_END:
            return None
        if status != MS_OK:
            raise self._damaged(partition)
        return found.epoch, found.offset, found.transaction

    def _holder(self, uint32_t partition):
        """(slot + 1 or 0, fence, taken up) of a partition."""
        cdef uint32_t slot
        cdef uint64_t fence
        cdef cbool taken
        ms_group_holder(&self.c, partition, &slot, &fence, &taken)
        return slot, fence, taken

    def _shares(self):
        """(position as `_position` has it, slot + 1 or 0, fence) of each partition, in one pass."""
        cdef uint32_t i, slot
        cdef uint64_t fence
        cdef cbool taken
        cdef list found = []
        for i in range(min(self.c.room, ms_load32(&self.c.header.partitions))):
            ms_group_holder(&self.c, i, &slot, &fence, &taken)
            found.append((self._position(i), slot, fence))
        return found

    def _members(self):
        """(slot, owner word, number, joined) of each member."""
        cdef uint32_t i, process
        cdef list found = []
        for i in range(<uint32_t>GROUP_MEMBERS_MOST):
            process = ms_load32(&self.c.members[i].process)
            if process != 0:
                found.append((i, process, ms_load32(&self.c.members[i].number),
                              <int64_t>ms_load64(&self.c.members[i].joined)))
        return found

    def _check(self):
        """Raise AssertionError unless the invariants of the file hold. At rest only."""
        cdef char text[256]
        text[0] = 0
        if not ms_group_check(&self.c, text, sizeof(text)):
            raise AssertionError((<bytes>text).decode("utf-8", "replace"))

    # --- changing ---------------------------------------------------------------------------------

    def _watch(self, bint at_once):
        """End members that are dead or whose deadline passed; how many. One process at a time
        does so, every 40 ms, unless `at_once`."""
        cdef uint32_t dead[GROUP_MEMBERS_MOST]
        cdef uint32_t count = 0, i, j, word, ended = 0, owner = 0
        cdef int64_t deadline = 0
        cdef uint64_t now = <uint64_t>ms_clock_monotonic_ns()
        cdef ms_status status
        self.alive()
        if not ms_group_claim_watch(&self.c, now, WATCH_NS) and not at_once:
            return 0
        for i in range(<uint32_t>GROUP_MEMBERS_MOST):
            word = ms_load32(&self.c.members[i].process)
            if word == 0 or word == self.c.self:
                continue
            for j in range(count):
                if dead[j] == word:
                    break
            else:
                if self.members.is_dead(word):
                    dead[count] = word
                    count += 1
        if count == 0 and not ms_group_overdue(&self.c, now):
            return 0
        while True:
            status = ms_group_try_end(&self.c, now, dead, count, &ended, &owner)
            if not self.again(status, owner, &deadline):
                return ended

    def _grow(self, uint32_t partitions):
        """The stream has so many partitions now, and the file has room for them."""
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        self.alive()
        while self.again(ms_group_try_grow(&self.c, partitions, &owner), owner, &deadline):
            pass

    def _set_position(self, uint32_t partition, uint64_t epoch, uint64_t offset):
        """Set the position of a partition that nobody has: "ok", "held" or "pending"."""
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        cdef ms_status status
        self.alive()
        while True:
            status = ms_group_try_seek(&self.c, partition, epoch, offset, &owner)
            if not self.again(status, owner, &deadline):
                break
        if status == MS_OK:
            self.sync_change(ms_clock_monotonic_ns())
        return "ok" if status == MS_OK else "held" if status == MS_LOST else "pending"

    def _drop(self):
        """The group is no more; False: it has members."""
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        cdef ms_status status
        self.alive()
        while True:
            status = ms_group_try_drop(&self.c, &owner)
            if not self.again(status, owner, &deadline):
                return status == MS_OK

    # --- transactions -----------------------------------------------------------------------------

    def _pending(self, uint32_t partition):
        """(transaction, fence, epoch, offset) of the position that is pending there, or None."""
        cdef ms_group_position found
        cdef uint64_t transaction, fence
        if ms_group_pending(&self.c, partition, &transaction, &fence, &found) != MS_OK:
            return None
        return transaction, fence, found.epoch, found.offset

    def _apply(self, uint32_t partition, uint64_t transaction, uint64_t epoch, uint64_t offset):
        """The transaction is committed: set the position, once; it is not pending any more."""
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        self.alive()
        while self.again(ms_group_try_apply(&self.c, partition, transaction, epoch, offset, &owner),
                         owner, &deadline):
            pass
        self.sync_change(ms_clock_monotonic_ns())

    def _revert(self, uint32_t partition, uint64_t transaction):
        """The transaction is not committed: its position is not pending any more."""
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        self.alive()
        while self.again(ms_group_try_revert(&self.c, partition, transaction, &owner), owner,
                         &deadline):
            pass
