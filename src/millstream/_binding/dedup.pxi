# ms_dedup.h: one mapped table of deduplication keys.

@cython.final
cdef class _DedupTable:
    """A table as mapped; `memory` is the map."""
    cdef ms_dedup c
    cdef _ControlBuffer keep

    def __cinit__(self, memory, bytes store_id, uint64_t queue_id, path):
        cdef ms_error err
        self.keep = hold_control(memory)
        status = ms_dedup_open(&self.c, self.keep.buffer.buf, <uint64_t>self.keep.buffer.len,
                               <const uint8_t *>PyBytes_AS_STRING(store_id), queue_id, &err)
        if status < 0:
            fail(status, &err, path)

    @property
    def stripes(self):
        return self.c.stripes

    @property
    def is_live(self):
        """Is it in use, and not being or having been copied to a larger one?"""
        return ms_load32(&self.c.header.state) == 1

    def thaw(self):
        """The copy was given up: this table is in use again."""
        must_write(not self.keep.buffer.readonly, "the table of deduplication keys")
        ms_dedup_thaw(&self.c)


def dedup_size(uint32_t stripes):
    """Bytes of a table of so many stripes."""
    return ms_dedup_size(stripes)


def dedup_header(uint32_t stripes, bytes store_id, uint64_t queue_id):
    """The first page of an empty table."""
    cdef bytes page = bytes(4096)
    ms_dedup_init(PyBytes_AS_STRING(page), stripes,
                  <const uint8_t *>PyBytes_AS_STRING(store_id), queue_id)
    return page
