# ms_partition.h: one partition as this process has it
cdef enum:
    DURABLE_SLICE_NS = 10000000  # 10 ms, then ask whether the process that syncs is alive


@cython.final
cdef class Partition:
    """The control block of a partition, and the segments that this process appends to."""
    cdef ms_partition c
    cdef object control
    cdef bint writable  # the block: of the store, or a reader's own
    cdef readonly Segment active
    cdef readonly Segment next
    cdef readonly uint32_t index
    cdef readonly object members
    cdef object sequences
    cdef _Seat syncing
    cdef int64_t sync_began
    cdef list placed  # segments that `get` has read of, by rising offset
    cdef uint32_t placed_structure

    cdef int changes(self) except -1:
        return must_write(self.writable, f"partition {self.index}")

    cdef int follow(self) except -1:
        """Follow a roll that the core did: what was next is active."""
        if self.next is not None and self.c.active == &self.next.c:
            self.active = self.next
            self.next = None
        return 0

    cdef inline bint can_sync(self) noexcept:
        """Has what is appended to, now or after a roll, the descriptor that its sync needs?"""
        return ((self.active is None or self.active.has_descriptor)
                and (self.next is None or self.next.has_descriptor))

    cdef Segment placed_for(self, uint64_t offset, uint64_t *limit):
        """The segment that holds an offset, and where its batches end; None: ask for it."""
        cdef Py_ssize_t low = 0, high
        cdef Segment segment
        # Acquire, in all of them: what lies below the tail is there, and the structure is no older.
        cdef uint64_t tail = ms_load64(&self.c.block.tail)
        if self.placed is None or offset < ms_load64(&self.c.block.first_offset):
            return None
        if ms_load32(&self.c.block.structure) != self.placed_structure:
            self.placed = None  # retention or compaction came: what is there may be another file
            return None
        high = len(self.placed)
        while low < high:
            if (<Segment>self.placed[(low + high) >> 1]).c.base_offset <= offset:
                low = ((low + high) >> 1) + 1
            else:
                high = (low + high) >> 1
        if low == 0:
            return None
        segment = <Segment>self.placed[low - 1]
        if segment.end_position:
            limit[0] = segment.end_position
            return segment if offset < segment.end_offset else None
        limit[0] = tail
        return segment if segment.c.number == ms_load64(&self.c.block.active) else None

    def place(self, Segment segment not None, uint64_t end_position, uint32_t structure):
        """Keep a segment for the next `get`.

        Args:
            end_position: where its successor begins; 0: it has none so far.
            structure: as it was before the segment was looked for.
        """
        cdef ms_mark end
        cdef ms_error err
        cdef Py_ssize_t i, count
        if structure != self.placed_structure or self.placed is None:
            self.placed = []
            self.placed_structure = structure
        if end_position and not segment.end_position:
            if ms_segment_mark_at(&segment.c, end_position, &end, &err) != MS_OK:
                return  # damaged: whoever reads there says so
            segment.end_offset = end.offset
            segment.end_position = end_position
        count = i = len(self.placed)
        while i > 0 and (<Segment>self.placed[i - 1]).c.base_offset >= segment.c.base_offset:
            i -= 1
        if i < count and (<Segment>self.placed[i]).c.base_offset == segment.c.base_offset:
            self.placed[i] = segment
        else:
            self.placed.insert(i, segment)

    def displace(self):
        """Keep none of them."""
        self.placed = None

    def set_active(self, Segment segment):
        """Append to this segment (None: there is none yet)."""
        if segment is not None:
            must_write(segment.c.writable, segment.path)
        self.c.active = NULL if segment is None else &segment.c
        self.active = segment
        self.c.end_valid = False
        self.c.ready = 0
        if self.next is not None and segment is not None and self.next.c.number <= segment.c.number:
            self.set_next(None)

    def set_next(self, Segment segment):
        """Roll to this segment when the active one is full."""
        if segment is not None:
            must_write(segment.c.writable, segment.path)
        self.c.next = NULL if segment is None else &segment.c
        self.c.spare_wanted = False
        self.next = segment

    def set_sequences(self, Sequences sequences):
        """Admit the appends of producers by this table (None: by none, they have to wait)."""
        self.c.producers = NULL if sequences is None else &sequences.c
        self.sequences = sequences

    def configure(self, uint64_t ready_low, uint64_t unsynced_max, uint64_t late_us):
        self.c.ready_low = ready_low
        self.c.unsynced_max = unsynced_max
        self.c.late_us = late_us

    def set_ready(self, uint64_t position):
        """Pages are ready up to a position, so that this is said again when the tail comes near."""
        self.c.ready = position

    def fill(self, Segment segment not None, uint64_t begin, uint64_t end):
        """Write zeros to what lies of [begin, end) in a segment, in steps of FILL_BYTES of the file
        that the tail has not come to: the position of the next step, or -errno."""
        self.changes()
        cdef uint64_t at = ms_segment_file_position(&segment.c, begin) + MS_FILL_BYTES - 1
        cdef uint64_t last = ms_segment_file_position(&segment.c, segment.within(0, end))
        cdef uint64_t position
        cdef ms_status status
        cdef int error = 0, descriptor = segment.filler
        # Nobody closes it meanwhile: its number would soon be that of another file.
        segment.filler = -1
        if descriptor < 0:
            return begin
        at -= at % MS_FILL_BYTES
        with nogil:
            while error == 0 and at + MS_FILL_BYTES <= last:
                position = segment.c.base_position + at - segment.c.data_position
                status = ms_partition_begin_fill(&self.c, &segment.c, position)
                if status == MS_BUSY:
                    break
                if status == MS_OK:
                    error = ms_file_fill(descriptor, at, MS_FILL_BYTES)
                    ms_owner_release(&self.c.block.append)
                at += MS_FILL_BYTES
        segment.fill_with(descriptor)
        if error:
            return -error
        return segment.within(0, segment.c.base_position + at - segment.c.data_position)

    cdef int clear_for(self, const ms_shape *shape) except -1:
        """Write zeros, in one call, to the pages that a long batch is about to take.

        Pages that are stored to one by one are faulted, reserved and written back one by one: half
        of what a sync of 100 kB takes. They lie behind the tail, where bytes mean nothing. Where
        they cannot be written only time is lost, and the sync says what is wrong with the disk.
        """
        cdef Segment segment = self.active  # kept, whoever rolls meanwhile
        cdef uint64_t begin = 0, end = 0
        cdef int descriptor
        if segment is None or segment.descriptor < 0 or self.c.ready_low != 0:
            return 0
        # One of its own: a sync by another thread needs the other one, or may close it.
        descriptor = duplicate_descriptor(segment.descriptor, F_DUPFD_CLOEXEC, 0)
        if descriptor < 0:
            return 0
        if (ms_fork_guard(descriptor) == 0 and self.c.active == &segment.c
                and ms_partition_begin_clear(&self.c, shape, &begin, &end) == MS_OK):
            with nogil:
                ms_file_fill(descriptor, begin, end - begin)
                ms_owner_release(&self.c.block.append)
        ms_fork_release(descriptor)
        close_descriptor(descriptor)
        return 0

    @property
    def ready(self):
        return self.c.ready

    def take_written(self):
        """Did this process append since the last call?"""
        written = self.c.written
        self.c.written = False
        return written

    def end(self):
        """(position, offset, hash, timestamp_max) of the tail, or None while a writer is (or died)
        in between."""
        cdef ms_mark mark
        if ms_partition_try_end(self.c.block, &mark) != MS_OK:
            return None
        return mark.position, mark.offset, mark.hash, mark.timestamp_max

    def holds(self, uint64_t offset):
        """Is the offset one that can be read, or the next one? False also when it is not known at
        once."""
        cdef ms_mark mark
        return (ms_load64(&self.c.block.first_offset) <= offset
                and ms_partition_try_end(self.c.block, &mark) == MS_OK and offset <= mark.offset)

    @property
    def tail(self):
        return ms_load64(&self.c.block.tail)

    def is_beyond(self, uint64_t position):
        """Is the tail behind this position?"""
        return ms_load64(&self.c.block.tail) > position

    @property
    def active_number(self):
        return ms_load64(&self.c.block.active)

    @property
    def durable(self):
        return ms_load64(&self.c.block.durable)

    @property
    def durable_hash(self):
        return ms_load32(&self.c.block.durable_hash)

    @property
    def durable_offset(self):
        return ms_load64(&self.c.block.durable_offset)

    @property
    def walked(self):
        return ms_load64(&self.c.block.walked)

    @property
    def first_segment(self):
        return ms_load64(&self.c.block.first_segment)

    @property
    def first_offset(self):
        return ms_load64(&self.c.block.first_offset)

    @property
    def synced_to(self):
        return ms_load64(&self.c.block.synced_to)

    @property
    def synced_offset(self):
        return ms_load64(&self.c.block.synced_offset)

    @property
    def structure(self):
        return ms_load32(&self.c.block.structure)

    @property
    def poison(self):
        return ms_load32(&self.c.block.poison)

    def set_poison(self, uint32_t kind):
        """Refuse appends in every process from now on."""
        self.changes()
        ms_store32(&self.c.block.poison, kind)
        ms_add32(&self.c.block.durable_wake, 1)
        ms_futex_wake(&self.c.block.durable_wake, 0x7fffffff)

    def retire(self, uint64_t first_segment, uint64_t first_offset):
        """The log begins here now. Holder of the maintenance word."""
        self.changes()
        ms_store64(&self.c.block.first_offset, first_offset)
        ms_store64(&self.c.block.first_segment, first_segment)
        ms_add32(&self.c.block.structure, 1)

    @property
    def compacted(self):
        """Was a segment replaced, so that offsets may have gaps?"""
        return ms_load32(&self.c.block.compacted) != 0

    def replaced(self):
        """A segment was replaced by one that has less. Holder of the maintenance word, or of the
        walk word."""
        self.changes()
        ms_store32(&self.c.block.compacted, 1)
        ms_add32(&self.c.block.structure, 1)

    def set_durable(self, tuple mark):
        """The log is synced up to this mark. Holder of the sync word."""
        self.changes()
        cdef ms_mark at = ms_mark(mark[0], mark[1], mark[2], mark[3])
        # What lies behind the mark came after the sync began. Before: whoever then appends behind
        # all that is durable says a later time.
        ms_store64(&self.c.block.unsynced_at, <uint64_t>self.sync_began)
        ms_partition_set_durable(self.c.block, &at)

    def recovered(self, tuple mark, uint64_t active, uint64_t first_segment, uint64_t first_offset,
                  uint32_t poison):
        """Open the partition for this generation. Holder of the walk word."""
        self.changes()
        cdef ms_mark at = ms_mark(mark[0], mark[1], mark[2], mark[3])
        ms_partition_recovered(self.c.block, self.c.generation, &at, active, first_segment,
                               first_offset, poison)
        self.c.end_valid = False

    def take_over(self, uint32_t dead):
        """Take the append word from a dead owner, mend, give it back. "ok", "busy" or "moved"."""
        self.changes()
        cdef uint32_t owner
        cdef ms_status status = ms_partition_take_over(&self.c, dead, &owner)
        self.follow()
        return "ok" if status == MS_OK else "busy" if status == MS_BUSY else "moved"

    def wait_append_word(self, double timeout):
        """Wait a slice for the append word to be free: 0 when it was, else the owner."""
        self.changes()
        cdef uint32_t owner = 0
        cdef ms_status status
        cdef int64_t left = <int64_t>(timeout * 1e9) if timeout > 0 else 0
        with nogil:
            status = ms_owner_wait(&self.c.block.append, self.c.self, left, &owner)
        if status == MS_OK:
            ms_owner_release(&self.c.block.append)
            return 0
        PyErr_CheckSignals()
        return owner

    def lead_or_wait(self, uint64_t position, double timeout, work):
        """Group commit: "done" when the position is durable, "led" when the caller had to sync and
        `work(False)` did, "again" when the time-out or a slice passed, or the log is poisoned."""
        cdef int64_t left = <int64_t>(timeout * 1e9)
        cdef ms_status status
        cdef cbool lead = False
        if left > DURABLE_SLICE_NS:
            left = DURABLE_SLICE_NS
        if ms_load64(&self.c.block.durable) >= position:
            return "done"
        self.changes()
        if self.leads_already(work):
            return "led"
        self.syncing.check(ms_load32(&self.c.block.sync) & 0x7fffffff)
        before = wait_begins(self.syncing)
        try:
            if self.syncing.holder != 0 and let_others_run():
                left = 0
            with nogil:
                status = ms_partition_lead_or_wait(self.c.block, self.c.self, position, left, &lead)
        finally:
            wait_ends(before)
        if lead:
            self.led(work, False)
            return "led"
        PyErr_CheckSignals()
        return "done" if status == MS_OK else "again"

    def lead(self, Word word not None, timeout, work):
        """Take the sync word, do `work(inherited)`, give it back. False: it is not free.

        `timeout`: seconds to wait for it (`LockTimeout`); None: not at all.
        """
        if self.leads_already(work):
            return True
        if timeout is not None:
            word.take(timeout)
        elif not word.try_take():
            return False
        self.led(work, word.inherited, True)
        return True

    cdef bint leads_already(self, work) except -1:
        """In the middle of a sync of this thread: what was asked for is done within it."""
        if not self.syncing.is_mine(ms_load32(&self.c.block.sync) & 0x7fffffff):
            return False
        work(self.syncing.inherited)
        return True

    cdef int led(self, work, bint inherited, bint seated=False) except -1:
        """Holder of the sync word: sync, give it back, wake. A signal comes in `work` or never."""
        if not seated:
            self.syncing.members = self.members
            self.syncing.sit(self.c.self, inherited)
        try:
            work(inherited)
        finally:
            if self.syncing.leave():
                ms_owner_release(&self.c.block.sync)
                ms_partition_end_sync(self.c.block)
        return 0

    cdef ms_status await_durable(self, uint64_t position, cbool *lead) noexcept:
        """`lead_or_wait` for a slice, without a Python call: MS_OK is "done"."""
        cdef ms_status status
        with nogil:
            status = ms_partition_lead_or_wait(self.c.block, self.c.self, position,
                                               DURABLE_SLICE_NS, lead)
        return status

    def wait_durable(self, uint64_t position, double timeout):
        """Sleep, without leading, until `durable` may have reached the position: at most `timeout`
        seconds."""
        cdef uint32_t seen = ms_load32(&self.c.block.durable_wake)
        cdef int64_t left = <int64_t>(timeout * 1e9)
        if self.writable:  # a read-only map cannot say that somebody waits
            ms_store32(&self.c.block.durable_waiters, 1)
            ms_fence()
        if ms_load64(&self.c.block.durable) < position and ms_load32(&self.c.block.poison) == 0:
            room = room_of_greenlets()
            if room is not None:
                room(self._follow_here, (seen, left))
            else:
                self._follow_here(seen, left)
                PyErr_CheckSignals()
        return ms_load64(&self.c.block.durable) >= position

    def _follow_here(self, uint32_t seen, int64_t left):
        with nogil:
            ms_partition_follow(self.c.block, seen, left)

    def begin_sync(self, uint64_t target):
        """The sync that the holder of the sync word begins will reach this position."""
        self.changes()
        self.sync_began = ms_clock_monotonic_ns()
        ms_partition_begin_sync(self.c.block, target)

    @property
    def unsynced_seconds(self):
        """For how long the oldest batch that is not durable has been there; 0: there is none."""
        cdef int64_t since = <int64_t>ms_load64(&self.c.block.unsynced_at)
        if since <= 0 or ms_load64(&self.c.block.durable) >= ms_load64(&self.c.block.tail):
            return 0.0
        return max(ms_clock_monotonic_ns() - since, 0) / 1e9

    def word(self, str name, object what, double timeout):
        """A long word of the block: "sync", "maintenance", "walk" or "compact"."""
        cdef void *word
        cdef Word made
        if name == "sync":
            made = make_word(&self.c.block.sync, self, self.members, f"{what}: the sync word",
                             timeout)
            self.syncing = made.seat
            return made
        if name == "maintenance":
            word = &self.c.block.maintenance
        elif name == "walk":
            word = &self.c.block.walk
        elif name == "compact":
            word = &self.c.block.compact
        else:
            raise ValueError(name)
        return make_word(word, self, self.members, f"{what}: the {name} word", timeout)
