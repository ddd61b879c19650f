# ms_producer.h: what a partition has of each producer, and the appends of one producer
cdef extern from *:
    """
    typedef struct { uint32_t producer, zero; uint64_t last, whole; } millstream_saved_sequence;
    """
    ctypedef struct millstream_saved_sequence:
        uint32_t producer
        uint32_t zero
        uint64_t last
        uint64_t whole


@cython.final
cdef class Sequences:
    """The table of one partition. Not thread-safe but for `of`: its owner has a lock."""
    cdef ms_producers c

    def __dealloc__(self):
        PyMem_Free(self.c.entries)

    @property
    def position(self):
        """Everything in the log before it is in the table."""
        return self.c.position

    def move(self, uint64_t position):
        """What is before this position was merged, or has no producer."""
        self.c.position = position

    def grow(self, uint32_t producer):
        """Have an entry for this producer. The table is not attached."""
        cdef uint32_t count = max(producer + 1, 2 * self.c.count, 64)
        if producer < self.c.count:
            return
        cdef ms_producer_entry *entries = <ms_producer_entry *>PyMem_Calloc(
            count, sizeof(ms_producer_entry))
        if entries == NULL:
            raise MemoryError
        if self.c.count:
            memcpy(entries, self.c.entries, self.c.count * sizeof(ms_producer_entry))
        PyMem_Free(self.c.entries)
        self.c.entries = entries
        self.c.count = count

    def walk(self, Segment segment not None, uint64_t limit):
        """Read the segment's batches from `position` to the limit. The table is not attached."""
        cdef ms_error err
        cdef ms_status status
        cdef uint32_t producer = 0
        limit = segment.within(0, limit)
        while True:
            with nogil:
                status = ms_producers_walk(&self.c, &segment.c, limit, &producer, &err)
            if status != MS_BEHIND:
                break
            self.grow(producer)
        if status < 0:
            fail(status, &err, segment.path)

    def of(self, uint32_t producer):
        """(last sequence, last sequence that ended a call) of a producer; -1: none."""
        if producer >= self.c.count:
            return -1, -1
        return (<int64_t>self.c.entries[producer].last - 1,
                <int64_t>self.c.entries[producer].whole - 1)

    def saved(self):
        """The entries as bytes, for a file."""
        cdef uint32_t i, found = 0
        for i in range(self.c.count):
            found += self.c.entries[i].last != 0
        cdef bytes data = PyBytes_FromStringAndSize(
            NULL, <Py_ssize_t>found * sizeof(millstream_saved_sequence))
        cdef millstream_saved_sequence *at = \
            <millstream_saved_sequence *><void *>PyBytes_AS_STRING(data)
        for i in range(self.c.count):
            if self.c.entries[i].last != 0:
                at.producer = i
                at.zero = 0
                at.last = self.c.entries[i].last
                at.whole = self.c.entries[i].whole
                at += 1
        return data

    def merge(self, bytes data):
        """Take over what `saved` returned. The table is not attached."""
        cdef millstream_saved_sequence entry
        cdef Py_ssize_t at
        for at in range(0, len(data), sizeof(millstream_saved_sequence)):
            memcpy(&entry, PyBytes_AS_STRING(data) + at, sizeof(entry))
            if entry.producer > MS_PRODUCER_MAX:
                raise ValueError(f"producer {entry.producer}")
            self.grow(entry.producer)
            if entry.last > self.c.entries[entry.producer].last:
                self.c.entries[entry.producer].last = entry.last
            if entry.whole > self.c.entries[entry.producer].whole:
                self.c.entries[entry.producer].whole = entry.whole


cdef class ProducerCore:
    """Base of `millstream.Producer`: appending, each record at most once."""
    cdef StreamCore log
    cdef uint32_t number
    cdef bint is_closed

    def _begin(self, StreamCore stream not None, uint32_t number):
        self.log = stream
        self.number = number

    cdef int alive(self) except -1:
        if self.is_closed:
            raise _errors.Closed("the producer is closed; ask the stream for it again")
        return self.log.alive()

    def _check(self):
        self.alive()

    def close(self):
        """Refuse further calls. Nothing waits in a producer, so nothing is lost without it."""
        self.is_closed = True

    @property
    def closed(self):
        """Is the producer closed?"""
        return self.is_closed or self.log.closed

    def append(self, value, *, sequence, key=None, headers=None, timestamp=None, partition=None,
               durability=None, timeout=None):
        """Append one record and return its `Position`; None where it is a re-send.

        It is a re-send, and adds nothing, when the partition has a record of this producer with
        this sequence or a higher one. Durability as for `Stream.append`, of a re-send too: at
        `sync` its first copy survives a power cut when this returns.

        Args:
            sequence: int from 0 to 2**63 - 2, rising from record to record; gaps are fine.
            partition: chooses the partition by hand, and must be the same for a re-send. Without
            it, the key chooses; without key and partition, the sequence, modulo the partitions.
            value, key, headers, timestamp, durability, timeout: see `Stream.append`.

        Raises: as `Stream.append`; Closed.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     producer = store.stream("s").producer(id="ingest-7")
        ...     print(producer.append(b"a", sequence=0), producer.append(b"a", sequence=0))
        Position(partition=0, epoch=1, offset=0) None
        """
        cdef ms_slice value_slice, key_slice
        cdef ms_records records
        cdef ms_shape shape
        cdef ms_appended out
        cdef ms_error err
        cdef ms_status status
        cdef uint32_t index
        cdef Position position
        cdef int level
        self.alive()
        if type(value) is not bytes or headers is not None or \
                (key is not None and type(key) is not bytes):
            spans = self.append_many(
                [value], first_sequence=sequence, keys=None if key is None else [key],
                headers=None if headers is None else [headers],
                timestamps=None if timestamp is None else self.log.microseconds(timestamp),
                partition=partition, durability=durability, timeout=timeout)
            return Position(*spans[0][:3]) if spans else None
        memset(&records, 0, sizeof(ms_records))
        records.count = 1
        records.values = &value_slice
        value_slice.data = <const uint8_t *>PyBytes_AS_STRING(value)
        value_slice.size = PyBytes_GET_SIZE(value)
        records.first_sequence = sequence_of(sequence)
        records.called_us = ms_clock_wall_us()
        records.timestamp = (records.called_us if timestamp is None
                             else self.log.microseconds(timestamp))
        if ms_load32(&self.log.header.partitions) != self.log.count:
            self.log._refresh()
        index = <uint32_t>(records.first_sequence % self.log.count)
        if key is not None:
            key_slice.data = <const uint8_t *>PyBytes_AS_STRING(key)
            key_slice.size = PyBytes_GET_SIZE(key)
            records.keys = &key_slice
            index = <uint32_t>(ms_xxh3_64(
                key_slice.data, <size_t>key_slice.size, 0) % self.log.count)
        if partition is not None:
            index = self.log._partition(partition).native.index
        level = self.log.level if durability is None else self.log.level_of(durability)
        status = ms_batch_measure(&records, &shape, &err)
        if status < 0:
            fail(status, &err, None)
        position = Position.__new__(Position)  # before: nothing fails behind the publishing
        if self.log.publish(index, &records, &shape, level, timeout, &out, self.number,
                            records.first_sequence):
            return None
        position.partition = index
        position.epoch = out.epoch
        position.offset = out.first_offset
        return position

    def append_many(self, values, *, first_sequence=None, sequences=None, keys=None, headers=None,
                    timestamps=None, partition=None, durability=None, timeout=None):
        """Append records, and return a `Span` for each partition that got some.

        What is a re-send (see `append`) is left out: the spans hold the new rest alone, and are
        none where nothing was new. Each partition gets its share whole or not at all. A process
        that dies in between leaves the shares of some partitions: `last_sequence` counts the call
        only when all are there.

        Args:
            values, keys, headers, timestamps, durability, timeout: see `Stream.append_many`.
            first_sequence: of the first record; each further one has one more. Or:
            sequences: one for each record, rising.
            partition: of all. Without it, the key of each chooses, or its sequence: see `append`.

        Raises: as `Stream.append_many`; Closed.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     producer = store.stream("s").producer(id="ingest-7")
        ...     _ = producer.append_many([b"a", b"b"], first_sequence=0)
        ...     producer.append_many([b"b", b"c"], first_sequence=1)
        [Span(partition=0, epoch=1, first_offset=2, count=1)]
        """
        self.alive()
        cdef SliceColumn value_column = column_of(values, "value")
        cdef SliceColumn key_column = None if keys is None else column_of(keys, "key", True)
        cdef HeaderColumn header_column = None
        cdef Py_ssize_t count = value_column.count
        cdef ms_records records
        cdef Py_buffer times
        cdef bint has_times = False
        cdef int level = self.log.level_of(durability)
        if key_column is not None and key_column.count != count:
            raise _errors.InvalidArgument(f"{key_column.count} keys for {count} values")
        if headers is not None:
            header_column = headers_of(headers, count)
        if count > 0x7fffffff:
            raise _errors.LimitExceeded(f"{count} records in one call, the limit is {0x7fffffff}")
        memset(&records, 0, sizeof(ms_records))
        records.count = <uint32_t>count
        records.values = value_column.slices
        if key_column is not None:
            records.keys = key_column.slices
        if header_column is not None:
            records.header_starts = header_column.starts
            records.header_names = header_column.names.slices
            records.header_values = header_column.values.slices
        cdef _Shares shares = _Shares.__new__(_Shares)
        shares.number_records(first_sequence, sequences, count)
        if count == 0:
            return []
        records.called_us = ms_clock_wall_us()
        if timestamps is None:
            records.timestamp = records.called_us
        else:
            made = self.log._timestamps(timestamps, count)
            if type(made) is int:
                records.timestamp = made
            else:
                PyObject_GetBuffer(made, &times, PyBUF_SIMPLE)
                has_times = True
                records.timestamps = <const int64_t *>times.buf
        try:
            if ms_load32(&self.log.header.partitions) != self.log.count:
                self.log._refresh()
            shares.choose(&records, self.log, partition)
            return self.append_shares(&records, shares, level, timeout)
        finally:
            if has_times:
                PyBuffer_Release(&times)

    cdef list append_shares(self, ms_records *records, _Shares shares, int level, object timeout):
        """All is measured before anything is appended. The share with the last record goes last:
        when it is there, the call was whole. At `sync` it waits until the others are durable."""
        cdef ms_shape shape
        cdef ms_appended out
        cdef ms_error err
        cdef ms_status status
        cdef uint32_t p, share, count, final = shares.final
        cdef _Share stored
        cdef list spans = []
        cdef list ends = []
        for p in range(shares.parts):
            if shares.select(records, p):
                status = ms_batch_measure(records, &shape, &err)
                if status < 0:
                    fail(status, &err, None)
                self.log.make_ready(shares.first_partition + p, level)
        try:
            for share in range(shares.parts):
                p = share + 1 if share >= final else share
                if p == shares.parts:
                    p = final
                    if level == 2:
                        self.log.make_all_durable(ends, timeout)
                elif not shares.select(records, p):
                    continue
                shares.select(records, p)
                stored = share_in(ends, spans)
                count = self.append_new(records, shares, p, p != final, level, timeout, &out)
                stored.store(shares.first_partition + p, &out, count)
                if count == 0:
                    spans.pop()
            return spans
        except BaseException as error:
            new = [stored for stored in ends if stored.span.count]
            raise self.log.account_for(error, new, level, timeout)

    cdef uint32_t append_new(self, ms_records *records, _Shares shares, uint32_t p, bint more,
                             int level, object timeout, ms_appended *out) except? 0xffffffff:
        """Append a share but for what is a re-send; how many records that were."""
        cdef ms_shape shape
        cdef ms_error err
        cdef ms_status status
        cdef uint32_t index = shares.first_partition + p
        cdef uint64_t last = shares.sequences[records.rows[records.count - 1]]
        while True:
            records.first_sequence = shares.sequences[records.rows[0]]
            status = ms_batch_measure(records, &shape, &err)
            if status < 0:
                fail(status, &err, None)
            if not self.log.publish(index, records, &shape, 0 if more and level == 2 else level,
                                    timeout, out, self.number,
                                    last | (MS_SEQUENCE_MORE if more else 0)):
                return records.count
            while records.count and shares.sequences[records.rows[0]] <= out.last_sequence:
                records.rows += 1
                records.count -= 1
            if records.count == 0:
                return 0


cdef class _Shares:
    """The records of one call, sorted by partition, each with its sequence."""
    cdef uint64_t *sequences
    cdef uint32_t *rows
    cdef uint32_t *ends  # of partition p's rows: ends[p], which is where those of p + 1 begin
    cdef uint32_t parts, first_partition, final

    def __dealloc__(self):
        PyMem_Free(self.sequences)
        PyMem_Free(self.rows)
        PyMem_Free(self.ends)

    cdef int number_records(self, object first, object given, Py_ssize_t count) except -1:
        """Check the sequences that a caller gave."""
        cdef Py_ssize_t i
        cdef uint64_t value = 0, before = 0
        if (first is None) == (given is None):
            raise _errors.InvalidArgument("give first_sequence, or sequences, and not both")
        if given is not None and not isinstance(given, (list, tuple)):
            try:
                given = list(given)
            except TypeError:
                raise _errors.InvalidType(
                    f"sequences {given!r}: expected one int for each record") from None
        if given is not None and len(given) != count:
            raise _errors.InvalidArgument(f"{len(given)} sequences for {count} values")
        self.sequences = <uint64_t *>PyMem_Malloc((count + 1) * sizeof(uint64_t))
        if self.sequences == NULL:
            raise MemoryError
        if given is None:
            value = sequence_of(first)
            if value + <uint64_t>count > MS_SEQUENCE_MAX + 1:
                raise _errors.InvalidArgument(
                    f"first_sequence {first}: of {count} records the last has a sequence above"
                    f" {MS_SEQUENCE_MAX}")
            for i in range(count):
                self.sequences[i] = value + <uint64_t>i
            return 0
        for i in range(count):
            value = sequence_of(given[i])
            if i and value <= before:
                raise _errors.InvalidArgument(
                    f"sequences: {value} at index {i} is not above {before} before it; the"
                    " sequences of one call must rise")
            self.sequences[i] = before = value
        return 0

    cdef int choose(self, const ms_records *records, StreamCore log, object partition) except -1:
        """Rows to partitions by counting sort. What is re-sent goes where it first went."""
        cdef uint32_t total = records.count, i, p
        cdef uint32_t *chosen = NULL
        self.parts = log.count
        if partition is not None:
            self.first_partition = log._partition(partition).native.index
            self.parts = 1
        self.rows = <uint32_t *>PyMem_Malloc(total * sizeof(uint32_t))
        self.ends = <uint32_t *>PyMem_Calloc(self.parts + 1, sizeof(uint32_t))
        chosen = <uint32_t *>PyMem_Malloc(total * sizeof(uint32_t))
        try:
            if self.rows == NULL or self.ends == NULL or chosen == NULL:
                raise MemoryError
            for i in range(total):
                if self.parts == 1:
                    p = 0
                elif records.keys != NULL and records.keys[i].size >= 0:
                    p = <uint32_t>(ms_xxh3_64(
                        records.keys[i].data, <size_t>records.keys[i].size, 0) % self.parts)
                else:
                    p = <uint32_t>(self.sequences[i] % self.parts)
                chosen[i] = p
                self.ends[p + 1] += 1
            self.final = chosen[total - 1]
            for p in range(self.parts):
                self.ends[p + 1] += self.ends[p]
            for i in range(total):
                self.rows[self.ends[chosen[i]]] = i
                self.ends[chosen[i]] += 1
        finally:
            PyMem_Free(chosen)
        return 0

    cdef uint32_t select(self, ms_records *records, uint32_t p) noexcept:
        """Let `records` be the rows of one partition; how many there are."""
        cdef uint32_t begin = self.ends[p - 1] if p else 0
        records.rows = self.rows + begin
        records.count = self.ends[p] - begin
        return records.count


cdef uint64_t sequence_of(object value) except? 0xffffffffffffffff:
    """A sequence that a caller gave."""
    value = index_of("sequence", value)
    if not 0 <= value <= MS_SEQUENCE_MAX:
        raise _errors.InvalidArgument(
            f"sequence {value}: expected an int from 0 to {MS_SEQUENCE_MAX}")
    return value
