# A record, and where it is.
from libc.stdint cimport UINT64_MAX
from cpython.mem cimport PyMem_Realloc

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object number, int *overflow) except? -1


@cython.final
@cython.freelist(64)
cdef class Position:
    """Where a record is: its partition, the epoch it was written in, and its offset there.

    Behaves as the tuple (partition, epoch, offset): unpacks, compares, hashes, pickles.

    >>> Position(3, 1, 42)
    Position(partition=3, epoch=1, offset=42)
    """
    cdef readonly int64_t partition
    cdef readonly uint64_t epoch
    cdef readonly uint64_t offset

    def __init__(self, partition, epoch, offset):
        self.partition = partition
        self.epoch = epoch
        self.offset = offset

    def __iter__(self):
        return iter((self.partition, self.epoch, self.offset))

    def __getitem__(self, index):
        return (self.partition, self.epoch, self.offset)[index]

    def __len__(self):
        return 3

    def __eq__(self, other):
        if not isinstance(other, (Position, tuple)):
            return NotImplemented
        return tuple(self) == tuple(other)

    def __lt__(self, other):
        if not isinstance(other, (Position, tuple)):
            return NotImplemented
        return tuple(self) < tuple(other)

    def __le__(self, other):
        if not isinstance(other, (Position, tuple)):
            return NotImplemented
        return tuple(self) <= tuple(other)

    def __gt__(self, other):
        if not isinstance(other, (Position, tuple)):
            return NotImplemented
        return tuple(self) > tuple(other)

    def __ge__(self, other):
        if not isinstance(other, (Position, tuple)):
            return NotImplemented
        return tuple(self) >= tuple(other)

    def __hash__(self):
        return hash((self.partition, self.epoch, self.offset))

    def __repr__(self):
        return f"Position(partition={self.partition}, epoch={self.epoch}, offset={self.offset})"

    def __reduce__(self):
        return Position, (self.partition, self.epoch, self.offset)


@cython.final
cdef class Span:
    """Records that one call appended to one partition: offsets first_offset to first_offset +
    count - 1.

    Behaves as the tuple (partition, epoch, first_offset, count).
    """
    cdef readonly int64_t partition
    cdef readonly uint64_t epoch
    cdef readonly uint64_t first_offset
    cdef readonly uint64_t count

    def __init__(self, partition, epoch, first_offset, count):
        self.partition = partition
        self.epoch = epoch
        self.first_offset = first_offset
        self.count = count

    def __iter__(self):
        return iter((self.partition, self.epoch, self.first_offset, self.count))

    def __getitem__(self, index):
        return (self.partition, self.epoch, self.first_offset, self.count)[index]

    def __len__(self):
        return 4

    def __eq__(self, other):
        return tuple(self) == tuple(other) if isinstance(other, (Span, tuple)) else NotImplemented

    def __hash__(self):
        return hash((self.partition, self.epoch, self.first_offset, self.count))

    def __repr__(self):
        return (f"Span(partition={self.partition}, epoch={self.epoch}, "
                f"first_offset={self.first_offset}, "
                f"count={self.count})")

    def __reduce__(self):
        return Span, (self.partition, self.epoch, self.first_offset, self.count)


@cython.final
@cython.freelist(64)
cdef class Record:
    """One record. Immutable; its value, key and headers are copied when they are asked for.

    It keeps the map of its segment as long as it lives, also when the store is closed or retention
    has removed the segment; what is to be kept for long is better kept as `record.value`. Behaves
    as the tuple (value, key, headers, timestamp, position): unpacks, compares, hashes, pickles.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     position = store.stream("s").append(b"v", key=b"k", timestamp=5)
    ...     store.stream("s").get(position)
    Record(value=b'v', key=b'k', headers={}, timestamp=5, position=Position(partition=0, epoch=1, \
offset=0))
    """
    cdef ms_view view
    cdef uint32_t row
    cdef readonly int32_t partition
    cdef readonly uint64_t epoch
    cdef object owner  # of what the view shows; None: it was made of `given`
    cdef tuple given

    def __init__(self, value, key, headers, timestamp, position):
        self.given = (value, key, dict(headers or ()), timestamp, position)
        if position is not None:  # of one that is made by hand, to try a function with
            self.partition, self.epoch, self.view.base_offset = position

    @property
    def value(self):
        """Its bytes; None: it is a null (a tombstone)."""
        cdef ms_view *view = &self.view
        if self.given is not None:
            return self.given[0]
        if view.value_offsets == NULL or (  # one that `__new__` alone has made
                view.value_validity != NULL and not ms_bit(view.value_validity, self.row)):
            return None
        return PyBytes_FromStringAndSize(
            <const char *>view.values + view.value_offsets[self.row],
            view.value_offsets[self.row + 1] - view.value_offsets[self.row])

    @property
    def key(self):
        """Bytes, or None where it has none."""
        cdef ms_view *view = &self.view
        if self.given is not None:
            return self.given[1]
        if view.key_offsets == NULL or (
                view.key_validity != NULL and not ms_bit(view.key_validity, self.row)):
            return None
        return PyBytes_FromStringAndSize(
            <const char *>view.keys + view.key_offsets[self.row],
            view.key_offsets[self.row + 1] - view.key_offsets[self.row])

    @property
    def headers(self):
        """A dict of str to bytes, a new one each time."""
        if self.given is not None:
            return dict(self.given[2])
        return headers_at(&self.view, self.row)

    @property
    def timestamp(self):
        """Microseconds since 1970 UTC."""
        if self.given is not None:
            return self.given[3]
        if self.view.timestamps != NULL:
            return self.view.timestamps[self.row]
        return self.view.timestamp_min

    @property
    def offset(self):
        """Its offset in its partition."""
        if self.view.offsets != NULL:
            return self.view.offsets[self.row]
        return self.view.base_offset + self.row

    @property
    def position(self):
        """Its `Position`."""
        cdef Position position
        if self.given is not None:
            return self.given[4]
        position = Position.__new__(Position)
        position.partition = self.partition
        position.epoch = self.epoch
        position.offset = self.offset
        return position

    cdef tuple parts(self):
        return (self.value, self.key, self.headers, self.timestamp, self.position)

    def __iter__(self):
        return iter(self.parts())

    def __getitem__(self, index):
        return self.parts()[index]

    def __len__(self):
        return 5

    def __eq__(self, other):
        if not isinstance(other, (Record, tuple)):
            return NotImplemented
        return self.parts() == tuple(other)

    def __hash__(self):
        return hash((self.partition, self.epoch, self.offset))

    def __repr__(self):
        return (f"Record(value={self.value!r}, key={self.key!r}, headers={self.headers!r}, "
                f"timestamp={self.timestamp}, position={self.position!r})")

    def __reduce__(self):
        return Record, self.parts()


def records_of(Batch batch not None):
    """The records of a batch, one by one."""
    cdef list found = []
    cdef Record record
    for i in range(batch.count):
        record = Record.__new__(Record)
        record.view = batch.view
        record.row = batch.first + <uint32_t>i
        record.partition = batch.partition
        record.epoch = batch.epoch
        record.owner = batch.owner
        found.append(record)
    return found


cdef uint64_t offset_of(object offset) except? 0:
    """An offset that a caller gave; what none can be is one larger than any."""
    cdef int overflow = 0
    cdef long long number
    if type(offset) is not int:
        offset = index_of("offset", offset)
    number = PyLong_AsLongLongAndOverflow(offset, &overflow)
    return UINT64_MAX if overflow or number < 0 else <uint64_t>number


cdef object each_offset(object offsets):
    """What was given for offsets, to iterate over."""
    refuse_mask(offsets, "offsets")
    as_list = getattr(offsets, "tolist", None)  # NumPy, Arrow: ints instead of scalars
    offsets = offsets if as_list is None else as_list()
    try:
        return iter(offsets)
    except TypeError as error:
        raise _errors.InvalidType(f"offsets {offsets!r:.80}: expected a list of int") from error


cdef struct run_of_records:
    uint64_t position
    uint64_t next_offset
    uint32_t segment, row, count, left


@cython.final
cdef class _Runs:
    """Records that were found one by one, for one batch: runs of one stored batch each."""
    cdef list segments
    cdef run_of_records *runs
    cdef size_t count, room
    cdef ms_gather gather

    def __cinit__(self):
        self.segments = []

    def __dealloc__(self):
        PyMem_Free(self.runs)

    cdef int make_room(self) except -1:
        cdef size_t room = 2 * self.room + 16
        cdef void *runs = PyMem_Realloc(self.runs, room * sizeof(run_of_records))
        if runs == NULL:
            raise MemoryError
        self.runs = <run_of_records *>runs
        self.room = room
        return 0

    cdef bint goes_on(self, uint64_t offset) noexcept:
        """Is it the record behind the last one, of the same batch? Then it is added."""
        cdef run_of_records *last
        if self.count == 0:
            return False
        last = &self.runs[self.count - 1]
        if last.left == 0 or last.next_offset != offset:
            return False
        last.next_offset += 1
        last.left -= 1
        last.count += 1
        return True

    cdef int add(self, Segment segment, uint64_t position, const ms_view *view,
                 uint32_t row) except -1:
        cdef run_of_records *run
        if self.count == self.room:
            self.make_room()
        run = &self.runs[self.count]
        if not self.segments or self.segments[len(self.segments) - 1] is not segment:
            self.segments.append(segment)
        run.segment = <uint32_t>(len(self.segments) - 1)
        run.position = position
        run.row = row
        run.count = 1
        # Behind a gap that compaction left, what follows is looked for.
        run.left = 0 if view.offsets != NULL else view.count - row - 1
        run.next_offset = view.base_offset + row + 1
        self.count += 1
        return 0

    cdef int view_of(self, run_of_records *run, ms_view *view) except -1:
        cdef ms_error err
        cdef Segment segment = self.segments[run.segment]
        cdef ms_status status = ms_segment_view(&segment.c, run.position,
                                                ms_segment_capacity_end(&segment.c), view, &err)
        if status != MS_OK:
            fail(status if status < 0 else MS_CORRUPT, &err, segment.path)
        return 0

    cdef Batch gathered(self, Partition native):
        cdef Batch batch = Batch.__new__(Batch)
        cdef Gathered memory = Gathered.__new__(Gathered)
        cdef ms_view view
        cdef run_of_records *run
        cdef size_t i, size
        memset(&self.gather, 0, sizeof(ms_gather))
        for i in range(self.count):
            run = &self.runs[i]
            self.view_of(run, &view)
            if not ms_gather_measure(&self.gather, &view, run.row, run.count):
                raise _errors.LimitExceeded(
                    "records of more than 2 GiB, or 2**31 of them: get them in parts")
        size = <size_t>((ms_gather_bytes(&self.gather) + 63) & ~<uint64_t>63)
        memory.bytes = <uint8_t *>aligned_alloc(64, size)
        if memory.bytes == NULL:
            raise MemoryError
        ms_gather_begin(&self.gather, memory.bytes, &batch.view)
        for i in range(self.count):
            run = &self.runs[i]
            self.view_of(run, &view)
            ms_gather_add(&batch.view, &self.gather, &view, run.row, run.count)
        batch.owner = memory
        batch.count = batch.view.count
        batch.partition = <int32_t>native.index
        batch.epoch = (<Segment>self.segments[len(self.segments) - 1]).c.epoch
        return batch
