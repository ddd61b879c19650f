# ms_compact.h: the table of keys, and which records of a segment stay
from libc.stdlib cimport calloc

FILLER_BYTES = MS_COMPACT_FILLER_BYTES
KEY_BYTES = sizeof(ms_key_entry) * 4 // 3


@cython.final
cdef class KeyTable:
    """The last offset of each key, in memory that is taken as it fills.

    For one thread at a time.
    """
    cdef ms_key_table c

    def __cinit__(self, uint64_t keys, bytes seed):
        if not 1 <= keys < <uint64_t>1 << 31 or len(seed) != 16:
            raise ValueError("keys or seed")
        self.c.capacity = keys * 4 // 3 + 4
        self.c.entries = <ms_key_entry *>calloc(self.c.capacity, sizeof(ms_key_entry))
        if self.c.entries == NULL:
            raise MemoryError
        memcpy(self.c.seed, PyBytes_AS_STRING(seed), 16)

    def __dealloc__(self):
        free(self.c.entries)

    @property
    def count(self):
        """Keys in it."""
        return self.c.count

    def clear(self):
        """Forget all keys."""
        memset(self.c.entries, 0, self.c.capacity * sizeof(ms_key_entry))
        self.c.count = 0

    def scan(self, Segment segment not None, uint64_t position, uint64_t limit, uint64_t begin,
             uint64_t size):
        """Enter keys of records at or behind offset `begin`, from the batch at `position` on: until
        `limit` or about `size` bytes. (position reached, None), or the offset that found no room.
        """
        cdef ms_error err
        cdef uint64_t full = 0
        cdef ms_status status
        limit = segment.within(0, limit)
        with nogil:
            status = ms_compact_scan(&self.c, &segment.c, &position, limit, begin, size, &full,
                                     &err)
        if status < 0:
            fail(status, &err, segment.path)
        return position, full if status == MS_FULL else None

    def hold(self, Segment segment not None, uint64_t position, uint64_t limit, uint64_t size):
        """Tombstones of keys that have records there stay; position reached, as of `scan`."""
        cdef ms_error err
        cdef ms_status status
        limit = segment.within(0, limit)
        with nogil:
            status = ms_compact_hold(&self.c, &segment.c, &position, limit, size, &err)
        if status < 0:
            fail(status, &err, segment.path)
        return position


@cython.final
cdef class Survivors:
    """Which records of a segment stay, by a table of keys. For one thread at a time."""
    cdef ms_survivors c
    cdef readonly Segment segment

    def __cinit__(self, KeyTable table not None, Segment segment not None, uint64_t end,
                  bint drop):
        cdef ms_error err
        cdef ms_status status
        self.segment = segment
        end = segment.within(0, end)
        self.c.end = end
        with nogil:
            status = ms_compact_count(&segment.c, end, &self.c.room, &err)
        if status < 0:
            fail(status, &err, segment.path)
        self.c.bits = <uint64_t *>malloc((self.c.room + 63) // 64 * 8 + 8)
        if self.c.bits == NULL:
            raise MemoryError
        with nogil:
            status = ms_compact_select(&table.c, &segment.c, drop, &self.c, &err)
        if status < 0:
            fail(status, &err, segment.path)

    def __dealloc__(self):
        free(self.c.bits)

    @property
    def records(self):
        """How many stay."""
        return self.c.records

    @property
    def dead(self):
        """How many do not."""
        return self.c.dead

    @property
    def tombstones(self):
        """How many tombstones stay."""
        return self.c.tombstones

    @property
    def tombstones_end(self):
        """The offset behind the last tombstone that does not stay; 0: there is none."""
        return self.c.tombstones_end

    @property
    def tombstones_removed(self):
        """How many tombstones do not."""
        return self.c.tombstones_removed

    @property
    def damaged(self):
        """How many places `repair` set aside."""
        return self.c.damaged

    def leave(self, KeyTable table not None):
        """The segment stays as it is: so do the tombstones of what is superseded in it."""
        cdef ms_error err
        cdef ms_status status
        with nogil:
            status = ms_compact_leave(&table.c, &self.segment.c, &self.c, &err)
        if status < 0:
            fail(status, &err, self.segment.path)

    def measure(self):
        """Bytes of data that the records that stay take; None: no less than now."""
        cdef ms_error err
        cdef ms_status status
        cdef uint64_t size = 0
        with nogil:
            status = ms_compact_measure(&self.segment.c, &self.c, &size, &err)
        if status < 0:
            fail(status, &err, self.segment.path)
        return size if status == MS_OK else None

    def copy(self, Segment target not None):
        """Write them into a new segment file, which is mapped writable and not activated."""
        cdef ms_error err
        cdef ms_status status
        with nogil:
            status = ms_compact_copy(&self.segment.c, &self.c, &target.c, &err)
        if status != MS_OK:
            fail(status if status < 0 else MS_CORRUPT, &err, target.path)
