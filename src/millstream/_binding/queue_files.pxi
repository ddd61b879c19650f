# The files of a queue as this process has mapped them: all of ms_queue.h but putting and taking,
# which is in queue.pxi.
cdef enum:
    SURPRISE_NS = 1000000000  # a reader that waits for so long is told how the queue came to be
    OUTWAIT_PAUSE_NS = 50000000
    OUTWAIT_NS = 500000000  # no thread of this process has a short word for so long

# --- the queue ------------------------------------------------------------------------------------

cdef class _QueueFiles:
    """The files of a queue as mapped: upkeep, reading, changing what nobody has
    leased. Base of `QueueCore`, which puts and takes.

    Hooks of the subclass: ``_grow_slots(count)``, ``_follow_dedup()``, ``_changed()``,
    ``_make_durable()``, ``_leave_to_background()``, ``_keep_up()``, ``_check_writable()``,
    ``_check_undecided()``.
    """
    cdef ms_queue c
    cdef list keep
    cdef object members
    cdef object codec
    cdef _DedupTable dedup   # None: no deduplication
    cdef bint attached
    cdef bint writable
    cdef bint is_closed
    cdef bint changed
    cdef int64_t unsynced_ns   # since when a change of this process waits for a sync; 0: none does
    cdef int64_t unsynced_before
    cdef uint32_t fork
    cdef public uint32_t _config_seen  # number of the settings that were read last
    cdef public double _surprise  # from when on a reader is told that nothing is here; 0: never
    cdef int level
    cdef int64_t lease_ms
    cdef int64_t ttl_us
    cdef int64_t payload_max
    cdef int64_t advanced_at
    cdef int64_t upkeep_at
    cdef int64_t outwaited_at    # when something of this process was last waited for,
    cdef int64_t outwaits_since  # and since when, without a pause
    cdef int64_t next_due
    cdef int64_t shift_us    # of the wall clock to the store's
    cdef uint64_t most_put, most_done  # that were told

    # --- what the subclass builds on --------------------------------------------------------------

    cdef int prepare(self, ms_queue *c, slots, blocks, hints, dict numbers, members,
                     bint writable) except -1:
        """Fill in what the core needs to use these maps."""
        cdef ms_error err
        cdef uint64_t blocks_size = 0
        cdef _ControlBuffer slots_buffer, blocks_buffer, hints_buffer
        memset(c, 0, sizeof(ms_queue))
        slots_buffer = hold_control(slots)
        hints_buffer = hold_control(hints)
        c.slots = <ms_slots_header *>slots_buffer.buffer.buf
        c.hints = <ms_hints_header *>hints_buffer.buffer.buf
        if self.keep is None:
            self.keep = []
            self.fork = ms_fork_count()
        if blocks is not None:
            blocks_buffer = hold_control(blocks)
            c.blocks = <ms_blocks_header *>blocks_buffer.buffer.buf
            blocks_size = <uint64_t>blocks_buffer.buffer.len
            self.keep.append(blocks_buffer)
        self.keep.append(slots_buffer)
        self.keep.append(hints_buffer)
        c.salt = c.slots.salt
        c.slot_bytes = numbers["slot_bytes"]
        c.capacity = numbers["capacity"]
        c.dead_limit = numbers["dead_limit"]
        c.slot_max = c.capacity + c.dead_limit
        c.block_max = numbers["block_max"]
        c.lanes = numbers["priorities"]
        c.max_attempts = numbers["max_attempts"]
        c.generation = numbers["generation"]
        c.ageing = numbers["ageing"]
        c.block_key = numbers["block_key"]
        c.dedup_window_us = numbers["dedup_window_us"]
        c.clock_offset_us = numbers["clock_offset_us"]
        c.clock_since_us = numbers["clock_since_us"]
        c.self = members.word if writable else 0
        status = ms_queue_attach(c, <uint64_t>slots_buffer.buffer.len, blocks_size,
                                 <uint64_t>hints_buffer.buffer.len, &err)
        if status < 0:
            fail(status, &err, self.path)
        if self.dedup is not None:
            ms_queue_use_dedup(c, &self.dedup.c)
        return 0

    def _attach(self, slots, blocks, hints, dict numbers, members, bint writable):
        """Use these maps. What was mapped before stays, for threads that are still in it."""
        cdef ms_queue c
        self.prepare(&c, slots, blocks, hints, numbers, members, writable)
        self.c = c
        self.members = members
        self.writable = writable
        self.attached = True

    def _move_hints(self, slots, blocks, hints, dict numbers):
        """Fill new hints, which nobody else has yet, from those in use. Holder of maintenance.

        Returns the words that it took and keeps: for `_give_back_hints`, if they are not published.
        """
        cdef ms_queue to
        cdef ms_instant now
        cdef uint32_t owner = 0, taken = 0, dead
        cdef int64_t deadline = ms_clock_monotonic_ns() + OWNER_NS
        self.prepare(&to, slots, blocks, hints, numbers, self.members, True)
        cdef void *scratch = malloc(ms_queue_scratch_size(&self.c))
        if scratch == NULL:
            raise MemoryError
        ms_now(&self.c, &now)
        try:
            while ms_queue_move_hints(&self.c, &to, &now, &taken, scratch, &owner) == MS_BUSY:
                dead = owner & 0x7fffffff
                with nogil:
                    ms_rest(100000)
                PyErr_CheckSignals()
                ms_now(&self.c, &now)
                if self.members.is_dead(dead):
                    ms_queue_sweep(&self.c, &now, &dead, 1)
                elif now.mono_ns > deadline:
                    raise _errors.LockTimeout(
                        f"{self.path}: held by {self.members.describe(owner)}")
        except BaseException:
            ms_queue_give_back_hints(&self.c, taken)
            raise
        finally:
            free(scratch)
        return taken

    def _give_back_hints(self, uint32_t taken):
        """What `_move_hints` filled is not published: those in use go on."""
        ms_queue_give_back_hints(&self.c, taken)

    def _configure_core(self, double lease, ttl, int64_t payload_max, codec, str durability):
        self.lease_ms = milliseconds_of_lease(lease)
        self.ttl_us = 0 if ttl is None else microseconds_of("ttl", ttl)
        self.payload_max = payload_max
        self.codec = codec
        self.level = LEVELS[durability]

    def _set_policy(self, uint32_t max_attempts, bint ageing, bint block_key,
                    int64_t dedup_window_us):
        self.c.max_attempts = max_attempts
        self.c.ageing = ageing
        self.c.block_key = block_key
        self.c.dedup_window_us = dedup_window_us

    def _recover(self, bint verify):
        """As the one who makes the hints, which nobody else has yet."""
        self.changes()
        cdef ms_instant now
        cdef void *scratch = malloc(ms_queue_scratch_size(&self.c))
        if scratch == NULL:
            raise MemoryError
        ms_now(&self.c, &now)
        try:
            with nogil:
                ms_queue_recover(&self.c, verify, &now, scratch)
                ms_queue_begin_totals(&self.c)
        finally:
            free(scratch)

    @property
    def _next_id(self):
        return ms_load64(&self.c.slots.next_id)

    def _begin_ids(self, uint64_t least):
        """As the one who makes the hints: ids go on from `least`."""
        self.changes()
        ms_queue_begin_ids(&self.c, least)

    cdef int changes(self) except -1:
        """Before each store into the files, where `alive` is not asked."""
        return must_write(self.writable, self.path)

    @property
    def _dedup(self):
        """The table of deduplication keys in use, or None."""
        return self.dedup

    def _use_dedup(self, _DedupTable table):
        """Use this table from now on. The former one stays, for threads that are still in it."""
        self.keep.append(table)
        self.dedup = table
        ms_queue_use_dedup(&self.c, &table.c)

    def _copy_dedup(self, _DedupTable to):
        """Copy what is in use into an empty table that nobody else has; False: it is too small."""
        self.changes()
        cdef ms_instant now
        cdef uint32_t owner = 0, stripe = 0
        cdef ms_status status = MS_BUSY
        while status == MS_BUSY:
            ms_now(&self.c, &now)
            status = ms_dedup_copy(&self.dedup.c, &to.c, self.c.self, now.time_us, &stripe, &owner)
            if status == MS_BUSY:
                self.outwait(owner)
        return status == MS_OK

    def _recover_claims(self):
        """Claims as the messages say, as the one who makes the hints; False: it is too small."""
        self.changes()
        cdef ms_instant now
        ms_now(&self.c, &now)
        return ms_queue_recover_claims(&self.c, &now) == MS_OK

    def _publish_slots(self, uint32_t count):
        self.changes()
        ms_queue_publish_slots(&self.c, count)

    def _publish_blocks(self, uint32_t count):
        self.changes()
        ms_queue_publish_blocks(&self.c, count)

    @property
    def _hints_at(self):
        """Which hints are in use: no two have the same, since all stay mapped."""
        return <size_t>self.c.hints

    def _word(self, str name, object what, double timeout):
        """A long word of the queue: "maintenance" or "sync"."""
        cdef void *word
        if name == "maintenance":
            word = &self.c.hints.maintenance
        else:
            word = &self.c.hints.sync
        return make_word(word, self, self.members, str(what), timeout,
                         f"{self.path}: the {name} word")

    def _begin_sync(self):
        """Number of the sync that begins now. Holder of the word."""
        self.changes()
        cdef uint64_t number = ms_load64(&self.c.hints.sync_begun) + 1
        ms_store64(&self.c.hints.sync_begun, number)
        self.unsynced_before = <int64_t>ms_load64(&self.c.hints.unsynced_at)
        ms_store64(&self.c.hints.unsynced_at, 0)
        ms_fence()
        return number

    def _end_sync(self, uint64_t number):
        self.changes()
        if ms_load64(&self.c.hints.sync_ended) < number:  # or one within it has ended
            ms_store64(&self.c.hints.sync_ended, number)

    def _undo_sync(self):
        """It failed. Holder of the word."""
        self.changes()
        ms_store64(&self.c.hints.unsynced_at, <uint64_t>self.unsynced_before)

    def _dirty(self):
        """Have the next sync write all that is in use: a failed one left its pages clean."""
        self.changes()
        cdef ms_queue c = self.c  # which another thread may replace meanwhile
        with nogil:
            ms_pages_dirty(c.slots, <size_t>ms_slots_size(c.slot_bytes,
                                                          ms_load32(&c.slots.slot_count)))
            if c.blocks != NULL:
                ms_pages_dirty(c.blocks,
                               <size_t>ms_blocks_size(ms_load32(&c.blocks.block_count)))

    def _close(self):
        self.is_closed = True

    def _wake_all(self):
        """Wake everybody who waits here; a reader waits for nothing."""
        if self.attached and self.writable:
            ms_queue_wake(&self.c, MS_WAIT_MESSAGE, INT32_MAX)
            ms_queue_wake(&self.c, MS_WAIT_ROOM, INT32_MAX)
            ms_queue_wake(&self.c, MS_WAIT_FINISHED, INT32_MAX)

    def _wake(self, str place, int32_t count):
        self.changes()
        ms_queue_wake(&self.c, PLACES[place], count)

    def _take_changed(self):
        """Did this process change anything since the last call?"""
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

    @property
    def _is_overdue(self):
        """Has a change, of any process, waited for a sync for longer than it should?"""
        cdef int64_t since = <int64_t>ms_load64(&self.c.hints.unsynced_at)
        cdef int64_t now = ms_clock_monotonic_ns()
        return (since != 0 and now - since > <int64_t>LATE_NS) or (
            self.level == 1 and self.unsynced_ns != 0 and now - self.unsynced_ns > <int64_t>LATE_NS)

    @property
    def _state(self):
        return ms_load32(&self.c.hints.state)

    def _set_state(self, uint32_t state):
        self.changes()
        ms_store32(&self.c.hints.state, state)

    @property
    def _slot_count(self):
        return ms_load32(&self.c.slots.slot_count)

    @property
    def _block_count(self):
        return 0 if self.c.blocks == NULL else ms_load32(&self.c.blocks.block_count)

    @property
    def _paused(self):
        return ms_load32(&self.c.slots.paused)

    def _set_undecided(self, uint32_t undecided):
        self.changes()
        ms_store32(&self.c.hints.undecided, undecided)

    @property
    def _queue_id(self):
        return self.c.slots.queue_id

    def _set_paused(self, uint32_t paused):
        self.changes()
        ms_store32(&self.c.slots.paused, paused)

    @property
    def _poison(self):
        return ms_load32(&self.c.slots.poison)

    def _set_poison(self, uint32_t poison):
        self.changes()
        ms_store32(&self.c.slots.poison, poison)

    @property
    def _config_number(self):
        return ms_load32(&self.c.slots.config)

    def _begin_config(self):
        """The settings are being changed: their number is even. Holder of maintenance."""
        self.changes()
        cdef uint32_t number = ms_load32(&self.c.slots.config)
        ms_store32(&self.c.slots.config, (number + 2) & ~<uint32_t>1)

    def _end_config(self):
        """They are changed: their number is odd."""
        self.changes()
        ms_store32(&self.c.slots.config, ms_load32(&self.c.slots.config) | 1)

    @property
    def _syncs(self):
        """(syncs begun, the last that ended well)."""
        return ms_load64(&self.c.hints.sync_begun), ms_load64(&self.c.hints.sync_ended)

    @property
    def closed(self):
        """Is the handle closed?"""
        return self.is_closed or self.fork != ms_fork_count()

    cdef inline bint usable(self) noexcept:
        return not self.is_closed and self.fork == ms_fork_count()

    cdef inline int alive(self) except -1:
        """May this process change the queue?"""
        if self.is_closed or self.fork != ms_fork_count() or not self.writable or \
                ms_load32(&self.c.hints.state) != 1 or ms_load32(&self.c.slots.poison) != 0 or \
                ms_load32(&self.c.slots.config) != self._config_seen:
            self._check_writable()
        return 0

    cdef int visible(self) except -1:
        """May this process read the queue? Whether a reader may is for Python to say."""
        if not self.writable or self.is_closed or self.fork != ms_fork_count() or \
                ms_load32(&self.c.hints.state) != 1 or \
                ms_load32(&self.c.slots.config) != self._config_seen:
            self._keep_up()
        return 0

    cdef inline int sync_change(self, const ms_instant *now) except -1:
        """Something was changed: sync it as the level says. An error says `Indeterminate`."""
        if self.level == 2:
            self.make_durable()
        elif not self.changed or (
                self.level == 1 and now.mono_ns - self.unsynced_ns > <int64_t>LATE_NS):
            self.report_change(now)
        return 0

    cdef int report_change(self, const ms_instant *now) except -1:
        self.set_changed(now)
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

    cdef void set_changed(self, const ms_instant *now) noexcept:
        self.changed = True
        if self.unsynced_ns == 0:
            self.unsynced_ns = now.mono_ns
        if self.level == 1 and ms_load64(&self.c.hints.unsynced_at) == 0:
            ms_store64(&self.c.hints.unsynced_at, <uint64_t>now.mono_ns)

    cdef object uncertain(self, object error):
        """What to raise where `error` came after a change was stored."""
        cdef ms_instant now
        ms_now(&self.c, &now)
        self.set_changed(&now)
        self._leave_to_background()
        self.changed = False  # the next change is reported again
        return _errors.indeterminate(
            error, "it is stored, but whether it survives a power cut is not known", self.path)

    cdef inline int change_in_journal(self, const ms_instant *now) except -1:
        """A transaction has changed something, and what it syncs is its journal."""
        if not self.changed:
            self.set_changed(now)
            self._leave_to_background()
        return 0

    # --- what time and deaths bring ---------------------------------------------------------------

    cdef int advance(self, const ms_instant *now) except -1:
        """Make ready what is due."""
        self.advanced_at = now.mono_ns
        ms_queue_try_advance(&self.c, now, &self.next_due)
        return 0

    cdef int upkeep(self, const ms_instant *now) except -1:
        """Do what is due: advance the wheel, watch for deaths, sweep."""
        cdef ms_instant then = now[0]
        cdef ms_queue c
        self.upkeep_at = now.mono_ns
        self.advance(now)
        if ms_queue_claim_watch(&self.c, now, UPKEEP_NS):
            self.watch(now)
        if self.dedup is not None and not self.dedup.is_live:
            self._follow_dedup()  # else what expires in the sweep could not be finished
        if ms_queue_sweep_due(&self.c, now):
            c = self.c  # which another thread may replace meanwhile
            with nogil:
                ms_queue_sweep(&c, &then, NULL, 0)
        return 0

    cdef int watch(self, const ms_instant *now) except -1:
        """Give what the dead held to others."""
        cdef uint32_t dead[DEAD_MOST]
        cdef uint32_t count = 0, i, word
        cdef ms_instant then = now[0]
        cdef ms_queue c = self.c
        for i in range(<uint32_t>DEAD_MOST):
            word = ms_load32(&self.c.participants[i])
            if word != 0 and word != self.c.self and self.members.is_dead(word):
                dead[count] = word
                count += 1
        if count:
            with nogil:
                ms_queue_sweep(&c, &then, dead, count)
            ms_queue_wake(&self.c, MS_WAIT_ROOM, INT32_MAX)
        if ms_load32(&self.c.hints.undecided):
            self._decide_undecided()
        return 0

    cdef int64_t wall_shift(self) noexcept:
        """Microseconds to add to a time of the store's clock, to show it by the wall clock."""
        cdef int64_t shift = ms_clock_wall_us() - ms_clock_boot_ns() // 1000 - \
            self.c.clock_offset_us
        # Less lies between two readings.
        if not -<int64_t>SHIFT_US <= shift - self.shift_us <= <int64_t>SHIFT_US:
            self.shift_us = shift
        return self.shift_us

    cdef bint alone(self) noexcept:
        """Has no other process put or taken here, of those that live?"""
        cdef uint32_t i, word
        for i in range(<uint32_t>DEAD_MOST):
            word = ms_load32(&self.c.participants[i])
            if word != 0 and word != self.c.self:
                return False
        return True

    cdef int outwait(self, uint32_t owner) except -1:
        """Another holds a short word: wait a moment, mend what a dead one held."""
        cdef ms_instant now
        cdef uint32_t dead = owner & 0x7fffffff
        cdef ms_queue c
        if owner == 0:
            self._follow_dedup()
            return 0
        with nogil:
            ms_rest(100000)
        PyErr_CheckSignals()
        if dead == self.c.self:  # a transaction that is not decided: maybe of a dead process
            ms_now(&self.c, &now)
            if now.mono_ns - self.outwaited_at > <int64_t>OUTWAIT_PAUSE_NS:
                self.outwaits_since = now.mono_ns
            self.outwaited_at = now.mono_ns
            self._check_undecided(now.mono_ns - self.outwaits_since > <int64_t>OUTWAIT_NS)
            self.upkeep(&now)
        elif self.members.is_dead(dead):
            ms_now(&self.c, &now)
            c = self.c
            with nogil:
                ms_queue_sweep(&c, &now, &dead, 1)
        self.alive()  # the owner may have taken it for good, to replace the hints
        return 0

    def _upkeep(self):
        """Do what is due now."""
        cdef ms_instant now
        self.alive()
        ms_now(&self.c, &now)
        self.upkeep(&now)

    def _sweep(self):
        """One pass over all messages, whether it is due or not."""
        cdef ms_instant now
        cdef uint32_t count
        self.alive()
        cdef ms_queue c = self.c
        ms_now(&self.c, &now)
        with nogil:
            count = ms_queue_sweep(&c, &now, NULL, 0)
        return count

    cdef int64_t slice(self, const ms_instant *now, int64_t deadline) noexcept:
        """How long to sleep at most before the next upkeep."""
        cdef int64_t most = ALONE_SLICE_NS if self.alone() else UPKEEP_NS
        cdef uint64_t ends = ms_load64(&self.c.hints.lease_due)
        cdef uint64_t expires = ms_load64(&self.c.hints.expiry_due)
        most = min(most, deadline - now.mono_ns)
        if <uint64_t>now.time_us < expires < <uint64_t>now.time_us + 1000000:
            most = min(most, <int64_t>(expires - <uint64_t>now.time_us) * 1000)
        if self.next_due != INT64_MAX:
            most = min(most, self.next_due - now.boot_ns)
        if 0 < ends < <uint64_t>INT64_MAX:
            most = min(most, max(<int64_t>ends - now.mono_ns, 1000000))
        return max(most, 0)

    # --- reading ----------------------------------------------------------------------------------

    cdef int find_living(self, uint32_t *out_living) except -1:
        """The owner word of each participant that is not proved dead, by member index."""
        cdef uint32_t i, word
        for i in range(<uint32_t>DEAD_MOST):
            word = ms_load32(&self.c.participants[i])
            out_living[i] = 0 if word == 0 or self.members.is_dead(word) else word
        return 0

    def _counts(self):
        """How many messages are in which state, `by_lane` the ready ones; and the totals.

        A lease that is over, or whose holder is dead, is none, whether or not a sweep has been.
        Of totals that are read beside others, put and done may be a few short: they never fall.
        """
        cdef ms_queue_counts counts
        cdef uint32_t living[DEAD_MOST]
        cdef ms_instant now
        self.visible()
        cdef ms_queue c = self.c
        ms_now(&self.c, &now)
        with nogil:
            ms_queue_count_swept(&c, &now, NULL, &counts)
        if counts.leased:
            self.find_living(living)
            ms_now(&self.c, &now)
            with nogil:
                ms_queue_count_swept(&c, &now, living, &counts)
        self.most_put = max(self.most_put, counts.put)
        self.most_done = max(self.most_done, counts.done)
        return {
            "put": self.most_put, "done": self.most_done,
            "failed": ms_load64(&c.slots.failed), "expired": ms_load64(&c.slots.expired),
            "cancelled": ms_load64(&c.slots.cancelled), "evicted": ms_load64(&c.slots.evicted),
            "redelivered": ms_load64(&c.slots.redelivered),
            "corrupt": ms_load64(&c.slots.corrupt), "refused": ms_load64(&c.slots.refused),
            "oldest_age": None if counts.oldest_us < 0 else counts.oldest_us / 1e6,
            "ready": counts.ready, "delayed": counts.delayed, "held": counts.held,
            "leased": counts.leased, "writing": counts.writing, "dead": counts.dead,
            "spare": counts.spare, "free": counts.free, "prepared": counts.prepared,
            "acking": counts.acking, "invalid": counts.invalid,
            "by_lane": [counts.by_lane[i] for i in range(self.c.lanes)],
        }

    def _holders(self):
        """How many messages each process has leased, by owner word, if it is not proved dead."""
        cdef uint32_t i, owner
        cdef uint64_t word, found
        cdef dict held = {}
        self.visible()
        for i in range(ms_load32(&self.c.slots.slot_count)):
            word = ms_load64(ms_queue_word(&self.c, i))
            if ms_word_state(word) != MS_MESSAGE_LEASED:
                continue
            found = ms_load64(&self.c.owners[i])
            owner = <uint32_t>(found >> 16)
            if owner and (found & 0xffff) == (word >> 34 & 0xffff):
                held[owner] = held.get(owner, 0) + 1
        return {word: count for word, count in held.items() if not self.members.is_dead(word)}

    def _participants(self):
        """Owner words of the processes that have put or taken here, if not proved dead."""
        cdef uint32_t living[DEAD_MOST]
        self.visible()
        self.find_living(living)
        return [living[i] for i in range(DEAD_MOST) if living[i]]

    def __len__(self):
        cdef ms_queue_counts counts
        self.visible()
        ms_queue_count(&self.c, &counts)
        return (counts.ready + counts.delayed + counts.held + counts.leased + counts.prepared +
                counts.acking)

    def __bool__(self):
        return True

    def _scan(self, states, uint32_t most=UINT32_MAX):
        """(lane, id, slot, word) of each message in one of the states, up to `most`.

        States are as `_counts` has them.
        """
        cdef uint32_t i, state, mask = 0
        cdef uint32_t living[DEAD_MOST]
        cdef bint asked = False
        cdef ms_instant now
        cdef uint64_t word
        cdef list found = []
        self.visible()
        ms_now(&self.c, &now)
        for name in states:
            mask |= <uint32_t>1 << <uint32_t>STATES[name]
        for i in range(ms_load32(&self.c.slots.slot_count)):
            word = ms_load64(ms_queue_word(&self.c, i))
            state = ms_word_state(word)
            if state == MS_MESSAGE_LEASED:
                if not asked:
                    self.find_living(living)
                    asked = True
                state = ms_queue_state_swept(&self.c, i, word, &now, living)
            if mask >> state & 1:
                if len(found) >= most:
                    break
                found.append((ms_word_lane(word), ms_queue_slot(&self.c, i).id, i, word))
        return found

    def _never_leased(self):
        """(how many are ready and were never leased, slot, word of the oldest), or None."""
        cdef uint32_t count, slot = 0
        cdef uint64_t word = 0
        self.visible()
        cdef ms_queue c = self.c
        with nogil:
            count = ms_queue_never_leased(&c, &slot, &word)
        return (count, slot, word) if count else None

    def _find(self, uint64_t id):
        """(slot, word) of a message that is not finished, or None."""
        cdef uint64_t word = 0
        cdef uint32_t slot
        self.visible()
        cdef ms_queue c = self.c
        with nogil:
            slot = ms_queue_find(&c, id, &word)
        return None if slot == UINT32_MAX else (slot, word)

    cdef bytes copy_content(self, uint32_t slot, uint64_t total):
        """Content in blocks, held to its hash; None where it is damaged."""
        cdef ms_error err
        cdef ms_queue c
        cdef ms_status status
        if total > <uint64_t>0x7fffffff:
            return None
        cdef bytes whole = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
        cdef char *start = PyBytes_AS_STRING(whole)
        if total < COPY_BYTES:
            status = ms_queue_copy_content(&self.c, slot, start, <size_t>total, &err)
        else:
            c = self.c  # which another thread may replace meanwhile
            with nogil:
                status = ms_queue_copy_content(&c, slot, start, <size_t>total, &err)
        return whole if status == MS_OK else None

    def _record(self, uint32_t index, uint64_t word):
        """A message as it lies there, without taking it; None: it is another one by now.

        (id, state, priority, attempts, put_at, due, expires, key, headers, data); data None: it is
        damaged. Times are of the wall clock.
        """
        cdef const ms_slot *slot
        cdef uint32_t key_length, headers_length, length
        cdef uint64_t total, after
        cdef const uint8_t *content
        cdef bytes whole = None
        cdef tuple fields
        cdef bint has_key
        cdef uint32_t state
        cdef uint32_t living[DEAD_MOST]
        cdef ms_instant now
        self.visible()
        if index >= ms_load32(&self.c.slots.slot_count):
            return None
        state = ms_word_state(word)
        if state == MS_MESSAGE_LEASED:
            self.find_living(living)
            ms_now(&self.c, &now)
            state = ms_queue_state_swept(&self.c, index, word, &now, living)
        slot = ms_queue_slot(&self.c, index)
        key_length = slot.key_length
        headers_length = slot.headers_length
        length = slot.payload_length
        total = <uint64_t>key_length + headers_length + length
        shift = <object>self.wall_shift()
        put_at, due, expires = <object>slot.put_at + shift, <object>slot.due, <object>slot.expires
        if due and not slot.lane & MS_SLOT_ABSOLUTE:
            due += shift
        fields = (slot.id, STATE_NAMES.get(state, "invalid"), ms_word_lane(word),
                  ms_word_attempts(word), put_at, due, expires and expires + shift)
        has_key = slot.key_hash != 0
        if ms_queue_slot_valid(&self.c, index, ms_word_reuse(word)):
            content = ms_queue_inline(&self.c, slot)
            if content == NULL:
                whole = self.copy_content(index, total)
            elif total <= self.c.slot_bytes - sizeof(ms_slot):
                whole = PyBytes_FromStringAndSize(<const char *>content, <Py_ssize_t>total)
        ms_fence()
        after = ms_load64(ms_queue_word(&self.c, index))
        if ms_word_reuse(after) != ms_word_reuse(word) or ms_word_state(after) in (0, 3):
            return None
        if whole is None:
            return fields + (None, {}, None)
        return fields + (whole[:key_length] if has_key else None,
                         unpack_headers(whole[key_length:key_length + headers_length]),
                         whole[key_length + headers_length:])

    def _failure(self, uint32_t slot, uint64_t id):
        """(first_at, last_at, attempts, kind, first, last) of a message's failures, or None.

        Times are of the wall clock.
        """
        cdef ms_failure failure
        self.visible()
        if slot >= ms_load32(&self.c.slots.slot_count) or \
                not ms_queue_failure(&self.c, slot, id, &failure):
            return None
        first = PyBytes_FromStringAndSize(<const char *>failure.first,
                                          min(failure.first_length, FAILURE_TEXT))
        last = PyBytes_FromStringAndSize(<const char *>failure.last,
                                         min(failure.last_length, FAILURE_TEXT))
        shift = <object>self.wall_shift()
        return (failure.first_at + shift, failure.last_at + shift, failure.attempts, failure.kind,
                first.decode("utf-8", "replace"), last.decode("utf-8", "replace"))

    def _cancel(self, uint32_t slot, uint64_t word):
        """Finish a message that nobody has leased; False: it is in another state now."""
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef ms_status status
        self.alive()
        ms_now(&self.c, &now)
        while True:
            status = ms_queue_try_cancel(&self.c, slot, word, &now, &owner)
            if status != MS_BUSY:
                break
            self.outwait(owner)
        if status == MS_OK:
            self.sync_change(&now)
        return status == MS_OK

    def _redrive(self, uint32_t slot, uint64_t word):
        """A dead letter becomes ready; False: it is none any more. Raises QueueFull."""
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef ms_status status
        self.alive()
        ms_now(&self.c, &now)
        while True:
            status = ms_queue_try_redrive(&self.c, slot, word, &now, &owner)
            if status == MS_GROW_SLOTS:
                self._grow_slots(ms_load32(&self.c.slots.slot_count))
                continue
            if status != MS_BUSY:
                break
            self.outwait(owner)
        if status == MS_FULL:
            raise _errors.QueueFull(
                f"{self.path}: {self.c.capacity} messages are not finished, so no dead letter can"
                " become one more; redrive when there is room, or alter(capacity=...)")
        if status == MS_OK:
            self.sync_change(&now)
        return status == MS_OK

    def _check(self):
        """Raise AssertionError unless the invariants of the files hold. At rest only."""
        cdef char text[512]
        self.visible()
        text[0] = 0
        if not ms_queue_check(&self.c, text, sizeof(text)):
            raise AssertionError((<bytes>text).decode("utf-8", "replace"))


cdef dict PLACES = {"message": MS_WAIT_MESSAGE, "room": MS_WAIT_ROOM, "finished": MS_WAIT_FINISHED}
cdef dict STATES = {
    "free": MS_MESSAGE_FREE, "writing": MS_MESSAGE_WRITING, "ready": MS_MESSAGE_READY,
    "delayed": MS_MESSAGE_DELAYED, "leased": MS_MESSAGE_LEASED, "dead": MS_MESSAGE_DEAD,
    "spare": MS_MESSAGE_SPARE, "held": MS_MESSAGE_HELD, "prepared": MS_MESSAGE_PREPARED,
    "acking": MS_MESSAGE_ACKING}
cdef dict STATE_NAMES = {value: name for name, value in STATES.items()}


def queue_sizes(uint32_t slot_bytes, uint32_t slot_count, uint32_t block_count, uint32_t slot_max,
                uint32_t lanes, bint ordered):
    """Bytes of (slots with slot_count, blocks with block_count, hints)."""
    return (ms_slots_size(slot_bytes, slot_count), ms_blocks_size(block_count),
            ms_hints_size(slot_max, lanes, ordered))
