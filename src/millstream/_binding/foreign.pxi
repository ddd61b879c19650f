# Batches of records that lie in no segment: those of another engine, or of a test.
@cython.final
cdef class _Offsets:
    """The offsets of a batch whose records do not follow one another, and its memory."""
    cdef object memory
    cdef Py_buffer view
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


def batch_of(uint32_t partition, uint64_t epoch, first_offset, values, *, keys=None, headers=None,
             timestamps=0, offsets=None):
    """A batch in memory of its own, laid out as a stored one.

    `offsets`: a buffer of int64, rising, where they are not `first_offset` and what follows it;
    `timestamps`: one for all, or a buffer of int64; microseconds since 1970.
    """
    cdef SliceColumn value_column = column_of(values, "value")
    cdef SliceColumn key_column = None if keys is None else column_of(keys, "key", True)
    cdef HeaderColumn header_column = None
    cdef Py_ssize_t count = value_column.count
    cdef ms_records records
    cdef ms_shape shape
    cdef ms_error err
    cdef ms_place place
    cdef ms_status status
    cdef Py_buffer times
    cdef bint has_times = False
    cdef uint64_t length
    cdef Gathered room = Gathered.__new__(Gathered)
    cdef Batch batch = Batch.__new__(Batch)
    cdef _Offsets numbers
    if count == 0 or (key_column is not None and key_column.count != count):
        raise _errors.InvalidArgument(f"a batch of {count} values"
            + ("" if key_column is None else f" and {key_column.count} keys"))
    memset(&records, 0, sizeof(ms_records))
    memset(&place, 0, sizeof(ms_place))
    records.count = <uint32_t>count
    records.values = value_column.slices
    if key_column is not None:
        records.keys = key_column.slices
    if headers is not None:
        header_column = headers_of(headers, count)
        records.header_starts = header_column.starts
        records.header_names = header_column.names.slices
        records.header_values = header_column.values.slices
    place.base_offset = first_offset
    if type(timestamps) is int:
        records.timestamp = timestamps
    else:
        PyObject_GetBuffer(timestamps, &times, PyBUF_SIMPLE)
        has_times = True
        if times.len != count * 8:
            PyBuffer_Release(&times)
            raise _errors.InvalidArgument(f"{times.len} bytes of timestamps for {count} values")
        records.timestamps = <const int64_t *>times.buf
    try:
        status = ms_batch_measure(&records, &shape, &err)
        if status < 0:
            fail(status, &err, None)
        length = ms_batch_length(&shape, 0)
        room.bytes = <uint8_t *>aligned_alloc(64, <size_t>((length + 63) & ~<uint64_t>63))
        if room.bytes == NULL:
            raise MemoryError
        memset(room.bytes, 0, <size_t>length)
        ms_batch_encode(&records, &shape, &place, room.bytes)
    finally:
        if has_times:
            PyBuffer_Release(&times)
    status = ms_batch_view(room.bytes, length, 0, &batch.view, &err)
    if status < 0:
        fail(status, &err, None)
    batch.count = <uint32_t>count
    batch.partition = <int32_t>partition
    batch.epoch = epoch
    batch.owner = room
    if offsets is not None:
        numbers = _Offsets.__new__(_Offsets)
        PyObject_GetBuffer(offsets, &numbers.view, PyBUF_SIMPLE)
        numbers.held = True
        if numbers.view.len != count * 8:
            raise _errors.InvalidArgument(f"{numbers.view.len} bytes of offsets for {count} values")
        numbers.memory = room
        batch.view.offsets = <const int64_t *>numbers.view.buf
        batch.owner = numbers
    return batch
