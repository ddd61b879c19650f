# ms_segment.h: a mapped segment file, and the cursor that reads along it
cdef enum:
    LARGE = 4096  # a batch of this many bytes is handed out as it lies
    GATHER_FIRST = 16  # records: a read at an offset should not pay for a scan
    GATHER_MOST = 16384


def segment_geometry(uint64_t size):
    """(index entries, data position) of a segment file of that size."""
    cdef uint32_t count, data
    ms_segment_geometry(size, &count, &data)
    return count, data


@cython.final
cdef class Segment:
    """One mapped segment. Keeps its map alive, and is kept alive by every batch made from it."""
    cdef ms_segment c
    cdef Py_buffer buffer
    cdef bint mapped
    cdef readonly object path
    cdef readonly uint32_t partition
    cdef int descriptor
    cdef int filler  # descriptor to write zeros with
    cdef readonly bint has_descriptor  # for syncing, here or with the one that syncs
    cdef bint given_up
    cdef uint64_t end_position, end_offset  # where its successor begins; 0: not known

    def __cinit__(self, map, bytes store_id, uint64_t stream_id, uint32_t partition,
            uint64_t number,
                  bint writable, path):
        cdef ms_identity identity
        cdef ms_error err
        cdef uint32_t count = 0, data = 0
        self.path = path
        self.partition = partition
        self.descriptor = self.filler = -1
        PyObject_GetBuffer(map, &self.buffer, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.mapped = True
        ms_segment_geometry(<uint64_t>self.buffer.len, &count, &data)
        self.c.checked = PyMem_Calloc(count + 1, sizeof(uint32_t))
        if self.c.checked == NULL:
            raise MemoryError
        memcpy(identity.store_id, PyBytes_AS_STRING(store_id), 16)
        identity.stream_id = stream_id
        identity.partition = partition
        identity.number = number
        if writable:
            # It will be stored to, page after page. Where the kernel reads ahead, there are small
            # folios in the cache before `Partition.fill` comes to them.
            ms_pages_random(self.buffer.buf, <size_t>self.buffer.len)
        cdef void *checked = self.c.checked
        cdef ms_status status = ms_segment_open(&self.c, self.buffer.buf, <uint64_t>self.buffer.len,
                                                writable, &identity, checked, &err)
        self.c.checked = checked
        if status < 0:
            fail(status, &err, path)

    def __dealloc__(self):
        self.close_filler()
        PyMem_Free(self.c.checked)
        if self.mapped:
            PyBuffer_Release(&self.buffer)

    def take_descriptor(self):
        """The descriptor kept for syncing, now the caller's; -1: there is none."""
        cdef int descriptor = self.descriptor
        self.descriptor = -1
        return descriptor

    def keep_descriptor(self, int descriptor):
        """Keep it for the next sync; False: the segment was given up, close it."""
        if self.given_up or self.descriptor >= 0:
            return False
        self.descriptor = descriptor
        self.has_descriptor = True
        return True

    @property
    def can_fill(self):
        """Has it a descriptor to write zeros with?"""
        return self.filler >= 0

    def fill_with(self, int descriptor):
        """Write zeros with this descriptor, and close it when the segment is given up."""
        self.close_filler()
        self.filler = descriptor
        if self.given_up:
            self.close_filler()

    cdef int close_filler(self) noexcept:
        if self.filler >= 0:
            close_descriptor(self.filler)
            self.filler = -1
        return 0

    def give_up(self):
        """Keep no descriptor any more; the one that was kept for syncing, or -1."""
        self.given_up = True
        self.close_filler()
        return self.take_descriptor()

    @property
    def number(self):
        return self.c.number

    @property
    def size(self):
        return self.c.size

    @property
    def salt(self):
        return self.c.salt

    @property
    def compaction(self):
        """(first, last, kept bytes, records, tombstones, tombstones end) of the compaction record;
        None: there is no valid one."""
        cdef ms_compaction record
        if not ms_compaction_load(&self.c, &record):
            return None
        return (record.first, record.last, record.kept_bytes, record.records, record.tombstones,
                record.tombstones_end)

    def set_compaction(self, tuple record):
        """Write the compaction record. Holder of the compact word; the segment is writable."""
        cdef ms_compaction to
        memset(&to, 0, sizeof(ms_compaction))
        (to.first, to.last, to.kept_bytes, to.records, to.tombstones, to.tombstones_end) = record
        must_write(self.c.writable, self.path)
        ms_compaction_store(&self.c, &to)

    @property
    def writable(self):
        return self.c.writable

    @property
    def activated(self):
        return self.c.activated or ms_segment_load_activation(&self.c) == MS_OK

    @property
    def base_offset(self):
        return self.c.base_offset

    @property
    def base_position(self):
        return self.c.base_position

    @property
    def epoch(self):
        return self.c.epoch

    @property
    def predecessor(self):
        return self.c.predecessor

    @property
    def predecessor_hash(self):
        return self.c.predecessor_hash

    @property
    def activated_at(self):
        return self.c.activated_at

    @property
    def timestamp_max(self):
        return self.c.timestamp_max

    @property
    def capacity_end(self):
        """Position behind the last byte of the file."""
        return ms_segment_capacity_end(&self.c)

    @property
    def data_bytes(self):
        return self.c.size - self.c.data_position

    cdef uint64_t within(self, uint64_t position, uint64_t limit):
        cdef uint64_t end = ms_segment_capacity_end(&self.c)
        return limit if limit < end else end

    def find_offset(self, uint64_t offset, uint64_t limit):
        """Position of the batch that holds the offset or comes after it; None below the limit."""
        cdef ms_error err
        cdef uint64_t position
        cdef ms_status status = ms_segment_find_offset(&self.c, offset, self.within(0, limit),
                &position, &err)
        if status < 0:
            fail(status, &err, self.path)
        return position if status == MS_OK else None

    def find_timestamp(self, int64_t timestamp, uint64_t limit):
        """Offset of the first record at or after the timestamp; None below the limit."""
        cdef ms_error err
        cdef uint64_t position
        cdef ms_view view
        limit = self.within(0, limit)
        cdef ms_status status = ms_segment_find_timestamp(&self.c, timestamp, limit, &position,
                &err)
        if status == MS_OK:
            status = ms_segment_view(&self.c, position, limit, &view, &err)
        if status < 0:
            fail(status, &err, self.path)
        if status != MS_OK:
            return None
        cdef uint32_t i = ms_view_find_timestamp(&view, timestamp)
        return view.offsets[i] if view.offsets != NULL else view.base_offset + i

    def mark_at(self, uint64_t position):
        """(position, offset, hash, timestamp_max) at the end of a batch."""
        cdef ms_error err
        cdef ms_mark mark
        cdef ms_status status = ms_segment_mark_at(&self.c, position, &mark, &err)
        if status != MS_OK:
            fail(status if status < 0 else MS_CORRUPT, &err, self.path)
        return mark.position, mark.offset, mark.hash, mark.timestamp_max

    def walk(self, tuple mark, limit, bint mend):
        """Walk valid batches from a mark: (mark, reason); the reason is "" at the limit or the
        segment's end,
        "end" where nothing follows, and otherwise says what is wrong at the mark."""
        cdef ms_error err
        cdef ms_mark at = ms_mark(mark[0], mark[1], mark[2], mark[3])
        cdef uint64_t until = self.within(0, min(limit, 0xffffffffffffffff))
        cdef ms_status status
        if mend:
            must_write(self.c.writable, self.path)
        ms_pages_random(self.buffer.buf, <size_t>self.c.size)
        with nogil:
            status = ms_segment_walk(&self.c, &at, until, mend, &err)
        reached = (at.position, at.offset, at.hash, at.timestamp_max)
        if status == MS_OK or at.position == until:
            return reached, ""
        return reached, "end" if status == MS_END else err.text.decode("utf-8", "replace")

    def suppose(self, uint64_t position):
        """Search for the batches of a segment without a valid activation record as if it began
        here."""
        if not self.c.activated:
            self.c.base_position = position

    def search(self, uint64_t begin, uint64_t data_end):
        """The first valid batch at or behind `begin`: (position, position synced before it), or
        None.

        `data_end`: the byte of the file behind which nothing was ever written.
        """
        cdef uint64_t limit = self.c.base_position
        if data_end > self.c.data_position:
            limit += data_end - self.c.data_position
        cdef uint64_t position, synced
        cdef ms_status status
        with nogil:
            status = ms_segment_search(&self.c, begin, limit, &position, &synced)
        return (position, synced) if status == MS_OK else None

    def populate(self, uint64_t begin, uint64_t end):
        """Fault in the pages of [begin, end) for writing; the position behind what was
        populated."""
        cdef uint64_t first = ms_segment_file_position(&self.c, begin) & ~<uint64_t>4095
        cdef uint64_t last = ms_segment_file_position(&self.c, self.within(0, end))
        cdef int error = 0
        if last > first and self.c.writable:
            with nogil:
                error = ms_pages_populate(self.c.bytes + first, <size_t>(last - first), True)
        return begin if error else self.within(0, end)

    def remove_behind(self, uint64_t position):
        """Give back the blocks behind the end of a sealed segment; its size stays."""
        cdef uint64_t first = (ms_segment_file_position(&self.c, position) + 4095) & ~<uint64_t>4095
        cdef uint64_t size = self.c.size & ~<uint64_t>4095
        cdef int error = 0
        ms_pages_normal(self.c.bytes, <size_t>self.c.size)  # from now on it is read alone
        if first < size and self.c.writable:
            with nogil:
                error = ms_pages_remove(self.c.bytes + first, <size_t>(size - first))
        return error

    def contents(self, uint64_t position):
        """A read-only view of the file up to a position of the log."""
        return memoryview(memory(self, self.c.bytes, <Py_ssize_t>ms_segment_file_position(&self.c,
            position)))

    def dirty(self, uint64_t begin, uint64_t end):
        """Make the header pages, the index and the kept bytes of [begin, end) dirty again."""
        must_write(self.c.writable, self.path)
        cdef uint64_t first = ms_segment_file_position(&self.c, begin) & ~<uint64_t>4095
        cdef uint64_t last = ms_segment_file_position(&self.c, end)
        with nogil:
            ms_pages_dirty(self.c.bytes, self.c.data_position)
            if last > first:
                ms_pages_dirty(self.c.bytes + first, <size_t>(last - first))


@cython.final
cdef class Cursor:
    """A place to read on in one partition: `position` of a batch and how many of its records were
    taken."""
    cdef readonly uint64_t position
    cdef readonly uint64_t offset
    cdef uint32_t skip
    cdef uint64_t gather

    def __cinit__(self, uint64_t position=0, uint64_t offset=0):
        self.position = position
        self.offset = offset
        self.gather = GATHER_FIRST

    def seek(self, Segment segment not None, uint64_t offset, uint64_t limit):
        """Go to the first record at or after an offset; False when there is none in the segment
        below the limit."""
        cdef ms_error err
        cdef ms_view view
        cdef uint64_t position
        limit = segment.within(0, limit)
        cdef ms_status status = ms_segment_seek(&segment.c, offset, limit, &position, &view, &err)
        if status < 0:
            fail(status, &err, segment.path)
        self.skip = 0
        if status != MS_OK:
            self.position = limit
            self.offset = offset
            return False
        self.position = position
        self.skip = ms_view_find_offset(&view, offset)
        self.offset = offset
        return True

    def move(self, uint64_t position, uint64_t offset):
        """Go to the beginning of a batch."""
        self.position = position
        self.offset = offset
        self.skip = 0

    def next(self, Segment segment not None, uint64_t limit, uint64_t most):
        """The next batch of the segment below the limit, of at most `most` records; None at the
        limit."""
        cdef ms_error err
        cdef ms_view view
        cdef ms_gather gather
        cdef ms_status status
        cdef Batch batch
        cdef uint32_t left
        cdef uint64_t position
        cdef uint32_t skip
        limit = segment.within(0, limit)
        drain_pins()
        while True:
            status = ms_segment_view(&segment.c, self.position, limit, &view, &err)
            if status == MS_END:
                return None
            if status < 0:
                fail(status, &err, segment.path)
            if view.count > self.skip:
                break
            self.position += view.length
            self.skip = 0
        batch = Batch.__new__(Batch)
        batch.partition = <int32_t>segment.partition
        batch.epoch = segment.c.epoch
        if view.length < LARGE and self.position + view.length < limit:
            position = self.position
            skip = self.skip
            status = ms_segment_measure_run(&segment.c, &position, &skip, limit,
                                            self.gather if self.gather < most else most, LARGE,
                                            &gather, &err)
            if status < 0:
                fail(status, &err, segment.path)
            if gather.count > view.count - self.skip:
                gather_into(batch, segment, self.position, self.skip, &gather)
                self.position = position
                self.skip = skip
                if self.gather < GATHER_MOST:
                    self.gather *= 4
                self.offset = <uint64_t>batch.next_offset
                return batch
        left = view.count - self.skip
        batch.view = view
        batch.owner = segment
        batch.first = self.skip
        if left > most:
            batch.count = <uint32_t>most
            self.skip += batch.count
        else:
            batch.count = left
            self.position += view.length
            self.skip = 0
        self.offset = <uint64_t>batch.next_offset
        return batch


cdef int gather_into(Batch batch, Segment segment, uint64_t position, uint32_t skip,
                     const ms_gather *gather) except -1:
    cdef Gathered memory = Gathered.__new__(Gathered)
    cdef size_t size = <size_t>((ms_gather_bytes(gather) + 63) & ~<uint64_t>63)
    memory.bytes = <uint8_t *>aligned_alloc(64, size)
    if memory.bytes == NULL:
        raise MemoryError
    ms_gather_begin(gather, memory.bytes, &batch.view)
    ms_segment_gather_run(&segment.c, position, skip, gather, &batch.view)
    batch.owner = memory
    batch.count = batch.view.count
    return 0
