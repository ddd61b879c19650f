# One consumer's membership in a group: its partitions, and how far it was given them
cdef extern from "ms_heartbeat.h" nogil:
    int ms_heartbeat_add_session(ms_heartbeat_entry *entry, void *deadline, uint64_t token,
                                 int64_t session_ms)

cdef struct Reading:
    uint64_t fence  # 0: the partition is another's
    uint64_t epoch  # of what was handed out last
    uint64_t offset  # behind it: what a commit sets
    uint64_t most  # the largest offset that was, by this owner
    bint dirty  # the position is not committed
    bint sought  # it may be committed backwards


@cython.final
cdef class Membership:
    """One consumer of a group, from join to leave: its partitions and how far it was given them.

    Used by one thread at a time.
    """
    cdef GroupCore group
    cdef uint32_t slot
    cdef uint32_t number
    cdef readonly bint joined
    cdef uint32_t changes
    cdef uint32_t count
    cdef Reading *parts
    cdef uint64_t *fences
    cdef uint8_t *flags
    cdef uint32_t dirty_count
    cdef uint32_t dirty_last
    cdef readonly list forfeited  # lost with what was handed out and not committed
    cdef int64_t session_ms
    cdef int64_t processing_ns
    cdef uint64_t processing
    cdef int64_t now
    cdef int64_t watched
    cdef ms_heartbeat_entry entry
    cdef bint beating
    cdef bint commits_first

    def __cinit__(self, GroupCore group not None, double session, double max_processing,
                  bint commits_first):
        self.group = group
        self.session_ms = <int64_t>(session * 1e3)
        self.processing_ns = <int64_t>(max_processing * 1e9)
        self.commits_first = commits_first
        self.forfeited = []

    def __dealloc__(self):
        self.stop_beating()
        PyMem_Free(self.parts)
        PyMem_Free(self.fences)
        PyMem_Free(self.flags)

    cdef void stop_beating(self) noexcept:
        cdef ms_heartbeat_state state
        if self.beating:
            self.beating = False
            ms_heartbeat_remove(&self.entry, &state)

    cdef int room(self, uint32_t count) except -1:
        """Have entries for so many partitions."""
        cdef void *parts
        cdef uint32_t i
        if count <= self.count:
            return 0
        parts = PyMem_Calloc(count, sizeof(Reading))
        if parts == NULL:
            raise MemoryError
        if self.count:
            memcpy(parts, self.parts, self.count * sizeof(Reading))
        PyMem_Free(self.parts)
        self.parts = <Reading *>parts
        PyMem_Free(self.fences)
        PyMem_Free(self.flags)
        self.fences = <uint64_t *>PyMem_Calloc(count, sizeof(uint64_t))
        self.flags = <uint8_t *>PyMem_Calloc(count, 1)
        if self.fences == NULL or self.flags == NULL:
            raise MemoryError
        self.count = count
        return 0

    # --- membership -------------------------------------------------------------------------------

    def join(self):
        """Be a member; False: there is no room for another."""
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        cdef ms_status status
        cdef uint64_t session
        cdef int error
        global _stops_at_exit
        if not _stops_at_exit:
            import atexit
            atexit.register(heartbeat_stop)
            _stops_at_exit = True
        self.group.alive()
        self.now = ms_clock_monotonic_ns()
        session = <uint64_t>(self.now + self.session_ms * 1000000)
        self.processing = <uint64_t>(self.now + self.processing_ns)
        while True:
            status = ms_group_try_join(&self.group.c, session, self.processing, &self.slot,
                                       &self.number, &owner)
            if not self.group.again(status, owner, &deadline):
                break
        if status != MS_OK:
            return False
        self.joined = True
        self.changes = ms_load32(&self.group.c.header.changes) - 1
        error = ms_heartbeat_add_session(
            &self.entry, &self.group.c.members[self.slot].session, session, self.session_ms)
        if error:
            self.leave()
            raise _errors.StorageError(error, NO_THREAD, self.group.path)
        self.beating = True
        return True

    def leave(self):
        """Be none any more; what was not released is the others' at once."""
        cdef uint32_t owner = 0, i
        cdef int64_t deadline = 0
        self.stop_beating()
        if not self.joined:
            return
        self.joined = False
        for i in range(self.count):
            self.parts[i].fence = 0
            self.clean(i)
        if not self.group.closed and self.group._state == GROUP_LIVE:
            while self.group.again(
                    ms_group_try_leave(&self.group.c, self.slot, self.number, &owner), owner,
                    &deadline):
                pass

    def begin(self):
        """Is there anything to be done but to read? A few loads."""
        self.group.alive()
        self.now = ms_clock_monotonic_ns()
        if not self.joined:
            return True
        if self.now - self.watched >= <int64_t>WATCH_NS:
            self.watched = self.now
            return True
        return ms_load32(&self.group.c.header.changes) != self.changes

    @property
    def others(self):
        """Has the group other members?"""
        cdef uint32_t i
        for i in range(<uint32_t>GROUP_MEMBERS_MOST):
            if i != self.slot and ms_load32(&self.group.c.members[i].process) != 0:
                return True
        return False

    @property
    def unseen(self):
        """Did the group change since the last take_up?"""
        return ms_load32(&self.group.c.header.changes) != self.changes

    def take_up(self):
        """(new, lost, leaving) partitions; None: the membership was ended."""
        cdef uint32_t owner = 0, i, changes = 0
        cdef int64_t deadline = 0
        cdef ms_status status
        self.room(self.group.c.room)
        while True:
            status = ms_group_try_take_up(&self.group.c, self.slot, self.number, self.fences,
                                       self.flags, self.count, &changes, &owner)
            if not self.group.again(status, owner, &deadline):
                break
            self.room(self.group.c.room)
        new, lost, leaving = [], [], []
        if status != MS_OK:
            return None
        self.changes = changes
        for i in range(self.count):
            if self.parts[i].fence != self.fences[i]:
                if self.parts[i].fence != 0:
                    lost.append(i)
                self.forfeit(i)
                self.parts[i].fence = self.fences[i]
                self.parts[i].most = 0
                if self.fences[i] != 0:
                    new.append(i)
            if self.fences[i] != 0 and self.flags[i] & MS_GROUP_LEAVING:
                leaving.append(i)
        return new, lost, leaving

    def ended(self):
        """Forget what the ended membership had: its partitions."""
        cdef uint32_t i
        self.stop_beating()
        self.joined = False
        gone = []
        for i in range(self.count):
            if self.parts[i].fence != 0:
                gone.append(i)
                self.parts[i].fence = 0
            self.forfeit(i)
        return gone

    def release(self, uint32_t partition):
        """Hand a partition to its heir."""
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        cdef ms_group_claim claim
        if not self.claim(partition, &claim):
            return
        while self.group.again(ms_group_try_release(&self.group.c, &claim, &owner), owner,
                               &deadline):
            pass
        self.parts[partition].fence = 0
        self.clean(partition)

    def assigned(self):
        """The partitions that the group's file says are this member's."""
        cdef uint32_t i, slot
        cdef uint64_t fence
        cdef cbool taken
        cdef list found = []
        if not self.joined or ms_load32(&self.group.c.members[self.slot].number) != self.number:
            return found
        for i in range(min(self.group.c.room, ms_load32(&self.group.c.header.partitions))):
            ms_group_holder(&self.group.c, i, &slot, &fence, &taken)
            if slot == self.slot + 1:
                found.append(i)
        return found

    # --- time -------------------------------------------------------------------------------------

    def work(self):
        """The caller works on what it was given: it must be back within max_processing."""
        self.push(<uint64_t>(self.now + self.processing_ns))

    def rest(self):
        """The caller waits here: it is not hung, however long it takes."""
        self.push(<uint64_t>0xffffffffffffffff)

    cdef void push(self, uint64_t to) noexcept:
        # Lost: the membership was ended, which the next take_up finds out.
        if self.joined and self.processing != to:
            if ms_group_renew(&self.group.c.members[self.slot].processing, &self.processing,
                              to) == MS_LOST:
                return

    # --- positions --------------------------------------------------------------------------------

    cdef inline bint claim(self, uint32_t partition, ms_group_claim *out) noexcept:
        if partition >= self.count or self.parts[partition].fence == 0:
            return False
        out.slot = self.slot
        out.partition = partition
        out.fence = self.parts[partition].fence
        return True

    cdef inline void clean(self, uint32_t partition) noexcept:
        if self.parts[partition].dirty:
            self.parts[partition].dirty = False
            self.dirty_count -= 1
        self.parts[partition].sought = False

    cdef int forfeit(self, uint32_t partition) except -1:
        if self.parts[partition].dirty:
            self.forfeited.append(partition)
        self.clean(partition)
        return 0

    def forgive(self):
        """What was handed out of lost partitions was undone; which they were."""
        found, self.forfeited = self.forfeited, []
        return found

    def forget(self, uint32_t partition):
        """What was handed out of a partition was committed elsewhere, or undone."""
        if partition < self.count:
            self.clean(partition)

    def is_dirty(self, uint32_t partition):
        """Was something of the partition handed out that is not committed?"""
        return partition < self.count and self.parts[partition].dirty

    cdef inline void soil(self, uint32_t partition) noexcept:
        if not self.parts[partition].dirty:
            self.parts[partition].dirty = True
            self.dirty_count += 1
        self.dirty_last = partition

    def start(self, uint32_t partition, uint64_t epoch, uint64_t offset, bint sought):
        """Reading goes on here; `sought`: because the user said so, and a commit will keep it."""
        if partition >= self.count or self.parts[partition].fence == 0:
            return
        self.parts[partition].epoch = epoch
        self.parts[partition].offset = offset
        self.parts[partition].most = max(self.parts[partition].most, offset)
        if sought:
            self.soil(partition)
            self.parts[partition].sought = True
        else:
            self.clean(partition)

    def fence_of(self, uint32_t partition):
        """The fence of a partition, 0 where it is another's."""
        return self.parts[partition].fence if partition < self.count else 0

    def positions(self):
        """(partition, epoch, offset) of what comes next, for each that was started."""
        cdef uint32_t i
        return [(i, self.parts[i].epoch, self.parts[i].offset) for i in range(self.count)
                if self.parts[i].fence != 0]

    def handed_out(self):
        """(partition, fence, epoch, offset) of what was handed out and is not committed."""
        cdef uint32_t i
        return [(i, self.parts[i].fence, self.parts[i].epoch, self.parts[i].offset)
                for i in range(self.count) if self.parts[i].dirty]

    def deliver(self, Batch batch not None):
        """The batch is handed out. False: it must not be, since its partition was lost."""
        cdef uint32_t partition = <uint32_t>batch.partition
        cdef Reading *part
        cdef ms_status status
        if partition >= self.count or self.parts[partition].fence == 0:
            return False
        part = &self.parts[partition]
        part.epoch = batch.epoch
        part.offset = <uint64_t>batch.next_offset
        part.most = max(part.most, part.offset)
        if self.commits_first:
            status = self.put(partition, part.epoch, part.offset, part.sought)
            if status == MS_FENCED:
                return False
            self.refuse(status, partition, part.offset)
            self.clean(partition)
            self.group.sync_change(self.now)
        else:
            self.soil(partition)
        self.push(<uint64_t>(self.now + self.processing_ns))
        return True

    cdef ms_status put(self, uint32_t partition, uint64_t epoch, uint64_t offset,
                       bint backwards) except? MS_NOMEM:
        cdef ms_group_claim claim
        cdef uint32_t owner = 0
        cdef int64_t deadline = 0
        cdef ms_status status
        self.group.alive()
        if not self.claim(partition, &claim):
            return MS_FENCED
        if self.group.level == 2:
            # Before: the kernel may write the position back as soon as it is there.
            self.group._await_log(partition, offset)
        while True:
            status = ms_group_try_commit(&self.group.c, &claim, epoch, offset, backwards, &owner)
            if status == MS_OK or not self.group.again(status, owner, &deadline):
                return status

    cdef int refuse(self, ms_status status, uint32_t partition, uint64_t offset) except -1:
        if status == MS_INVALID:
            found = self.group._position(partition)
            raise _errors.InvalidArgument(
                f"{self.group.path}: partition {partition} is at offset {found[1]} of epoch"
                f" {found[0]}; to commit {offset}, which is before that, seek, or pass"
                " allow_backwards=True")
        if status == MS_PENDING:
            raise _errors.InvalidArgument(
                f"{self.group.path}: a transaction has the position of partition {partition};"
                " commit or roll it back first")
        if status == MS_FENCED:
            self.fenced([partition])
        return 0

    def fenced(self, list partitions):
        """Raise for partitions that are another's."""
        names = ", ".join(map(str, partitions))
        raise _errors.Fenced(
            f"{self.group.path}: partition {names} has another owner now; this consumer did not ask"
            " for a batch within max_processing, was stopped for longer than its session, or has"
            " left: the position was not changed, and the records are delivered again",
            partitions=tuple(partitions))

    @property
    def dirty(self):
        """How many partitions have a position that is not committed."""
        return self.dirty_count

    @property
    def has_uncommitted(self):
        """Was something handed out that is not committed, or lost before it was?"""
        return self.dirty_count != 0 or bool(self.forfeited)

    def commit(self, bint backwards):
        """Set the positions of all that was handed out."""
        cdef ms_status status
        cdef uint32_t i
        cdef bint some = False
        cdef list fenced = None
        if self.forfeited:
            fenced = self.forgive()
        elif self.dirty_count == 0:
            self.group.alive()
            return
        cdef uint32_t first = self.dirty_last, end = self.dirty_last + 1
        if self.dirty_count != 1 or not self.parts[first].dirty:  # it was committed by its batch
            first, end = 0, self.count
        try:
            for i in range(first, end):
                if not self.parts[i].dirty:
                    continue
                status = self.put(i, self.parts[i].epoch, self.parts[i].offset,
                                  backwards or self.parts[i].sought)
                if status == MS_FENCED:
                    if fenced is None:
                        fenced = []
                    fenced.append(i)
                else:
                    if status != MS_OK:
                        self.refuse(status, i, self.parts[i].offset)
                    some = True
                self.clean(i)
        finally:  # those before one that fails are set
            if some:
                self.group.sync_change(self.now)
        if fenced is not None:
            self.fenced(fenced)

    def commit_at(self, uint32_t partition, uint64_t epoch, uint64_t offset, bint backwards):
        """Set the position of one partition."""
        cdef ms_status status
        if partition < self.count and self.parts[partition].fence != 0:
            if offset > self.parts[partition].most:
                raise _errors.InvalidArgument(
                    f"{self.group.path}: partition {partition} was handed out up to offset"
                    f" {self.parts[partition].most} here; a batch that ends at {offset} is not of"
                    " this consumer")
            backwards = backwards or self.parts[partition].sought
        status = self.put(partition, epoch, offset, backwards)
        if status != MS_OK:
            self.refuse(status, partition, offset)
        if self.parts[partition].offset == offset and self.parts[partition].epoch == epoch:
            self.clean(partition)
        self.parts[partition].sought = False
        self.group.sync_change(self.now)

    def prepare(self, uint64_t transaction):
        """Make what was handed out pending positions of a transaction: all of it or none.

        (partition, fence, epoch, offset) of each, for the journal. Raises Fenced.
        """
        cdef ms_group_claim *claims = NULL
        cdef ms_group_position *positions = NULL
        cdef uint32_t owner = 0, i, count = 0
        cdef int64_t deadline = 0
        cdef ms_status status = MS_OK
        self.group.alive()
        if self.forfeited:
            self.fenced(self.forgive())
        pending = self.handed_out()
        try:
            claims = <ms_group_claim *>PyMem_Calloc(self.dirty_count + 1, sizeof(ms_group_claim))
            positions = <ms_group_position *>PyMem_Calloc(self.dirty_count + 1,
                                                          sizeof(ms_group_position))
            if claims == NULL or positions == NULL:
                raise MemoryError
            for i in range(self.count):
                if self.parts[i].dirty and self.claim(i, &claims[count]):
                    positions[count].epoch = self.parts[i].epoch
                    positions[count].offset = self.parts[i].offset
                    count += 1
            while True:
                status = ms_group_try_prepare(&self.group.c, transaction, claims, positions, count,
                                              &owner)
                if not self.group.again(status, owner, &deadline):
                    break
        finally:
            PyMem_Free(claims)
            PyMem_Free(positions)
        if status == MS_FENCED:
            self.fenced([partition for partition, _, _, _ in pending])
        if status != MS_OK:
            self.refuse(status, pending[0][0], pending[0][3])
        return pending

    def applied(self, list pending):
        """What `prepare` gave was applied: it is not to be committed again."""
        for partition, fence, epoch, offset in pending:
            if self.parts[partition].fence == fence and self.parts[partition].offset == offset:
                self.clean(partition)
