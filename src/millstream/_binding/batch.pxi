# Batches as readers see them: views of the mapped file, kept alive by whoever holds them.
from cpython.bytes cimport PyBytes_FromStringAndSize


@cython.final
cdef class Memory:
    """Read-only bytes inside something that `owner` keeps alive; NumPy makes views of it."""
    cdef const void *start
    cdef Py_ssize_t size
    cdef object owner

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.start, self.size, 1, flags)

    def __len__(self):
        return self.size


cdef Memory memory(object owner, const void *start, Py_ssize_t size):
    cdef Memory self = Memory.__new__(Memory)
    self.owner = owner
    self.start = start
    self.size = size
    return self


cdef object _frombuffer = None


cdef object as_numpy(object owner, const void *start, Py_ssize_t count, object dtype,
        Py_ssize_t width):
    global _frombuffer
    if _frombuffer is None:
        _frombuffer = module_of("numpy").frombuffer
    if count == 0:
        numpy = module_of("numpy")
        empty = numpy.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return _frombuffer(memory(owner, start, count * width), dtype)


@cython.final
cdef class Gathered:
    """Memory of a batch that was gathered from small ones."""
    cdef uint8_t *bytes

    def __dealloc__(self):
        free(self.bytes)


@cython.final
@cython.freelist(8)
cdef class BytesIterator:
    cdef BytesColumn column
    cdef uint32_t at, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= self.end:
            raise StopIteration
        cdef uint32_t i = self.at
        self.at = i + 1
        cdef BytesColumn column = self.column
        if column.starts == NULL or (column.validity != NULL and not ms_bit(column.validity, i)):
            return None
        cdef int32_t begin = column.starts[i]
        return PyBytes_FromStringAndSize(<const char *>column.bytes + begin,
            column.starts[i + 1] - begin)

    def __length_hint__(self):
        return self.end - self.at


@cython.final
@cython.freelist(16)
cdef class BytesColumn:
    """A lazy sequence of bytes (None for null) over the mapped file.

    An element is copied when it is asked for. `offsets` and `data` are NumPy views without a copy:
    element i
    is ``data[offsets[i]:offsets[i + 1]]``.
    """
    cdef object owner
    cdef const int32_t *starts
    cdef const uint8_t *bytes
    cdef const uint8_t *validity
    cdef uint32_t first, count

    def __len__(self):
        return self.count

    def __iter__(self):
        cdef BytesIterator iterator = BytesIterator.__new__(BytesIterator)
        iterator.column = self
        iterator.at = self.first
        iterator.end = self.first + self.count
        return iterator

    cdef inline object element(self, Py_ssize_t index):
        cdef uint32_t i = self.first + <uint32_t>index
        if self.starts == NULL or (self.validity != NULL and not ms_bit(self.validity, i)):
            return None
        return PyBytes_FromStringAndSize(<const char *>self.bytes + self.starts[i],
                                         self.starts[i + 1] - self.starts[i])

    def __getitem__(self, index):
        cdef Py_ssize_t i
        if isinstance(index, slice):
            return self.cut(index)
        i = index
        if i < 0:
            i += self.count
        if i < 0 or i >= self.count:
            raise IndexError(f"index {index} of a column of {self.count}")
        return self.element(i)

    cdef object cut(self, object wanted):
        cdef Py_ssize_t i
        start, stop, step = wanted.indices(self.count)
        if step == 1:
            return column_view(self.owner, self.starts, self.bytes, self.validity,
                               self.first + <uint32_t>start, <uint32_t>max(0, stop - start))
        return [self.element(i) for i in range(start, stop, step)]

    def __eq__(self, other):
        if isinstance(other, (list, tuple, BytesColumn)):
            return len(other) == len(self) and list(self) == list(other)
        return NotImplemented

    __hash__ = None

    def __repr__(self):
        shown = ", ".join(repr(self.element(i)) for i in range(min(self.count, 4)))
        return f"<{self.count} bytes: [{shown}{', ...' if self.count > 4 else ''}]>"

    def tolist(self):
        """All elements as a list of bytes or None."""
        return list(self)

    def view(self, Py_ssize_t index):
        """One element as a read-only memoryview of the file, without a copy; None for null."""
        if index < 0:
            index += self.count
        if index < 0 or index >= self.count:
            raise IndexError(f"index {index} of a column of {self.count}")
        cdef uint32_t i = self.first + <uint32_t>index
        if self.starts == NULL or (self.validity != NULL and not ms_bit(self.validity, i)):
            return None
        return memoryview(memory(self.owner, self.bytes + self.starts[i],
                                 self.starts[i + 1] - self.starts[i]))

    @property
    def null_count(self):
        """How many elements are null."""
        cdef uint32_t i, nulls = 0
        if self.starts == NULL:
            return self.count
        if self.validity == NULL:
            return 0
        for i in range(self.first, self.first + self.count):
            nulls += not ms_bit(self.validity, i)
        return nulls

    @property
    def offsets(self):
        """NumPy int32 view, len + 1; relative to `data`. Zeros where the column is all null."""
        if self.starts == NULL:
            numpy = module_of("numpy")
            return numpy.zeros(self.count + 1, numpy.int32)
        return as_numpy(self.owner, self.starts + self.first, self.count + 1, "<i4", 4)

    @property
    def data(self):
        """NumPy uint8 view of the bytes of the whole stored column."""
        if self.starts == NULL:
            return as_numpy(self.owner, NULL, 0, "u1", 1)
        return as_numpy(self.owner, self.bytes, self.starts[self.first + self.count], "u1", 1)


cdef BytesColumn column_view(object owner, const int32_t *offsets, const uint8_t *data,
                             const uint8_t *validity, uint32_t first, uint32_t count):
    cdef BytesColumn self = BytesColumn.__new__(BytesColumn)
    self.owner = owner
    self.starts = offsets
    self.bytes = data
    self.validity = validity
    self.first = first
    self.count = count
    return self


cdef dict headers_at(const ms_view *view, uint32_t row):
    """The headers of one record."""
    cdef int32_t h
    cdef dict headers = {}
    if view.header_offsets == NULL:
        return headers
    for h in range(view.header_offsets[row], view.header_offsets[row + 1]):
        name = PyBytes_FromStringAndSize(<const char *>view.names + view.name_offsets[h],
                                         view.name_offsets[h + 1] - view.name_offsets[h])
        headers[name.decode("utf-8", "replace")] = PyBytes_FromStringAndSize(
            <const char *>view.header_values + view.header_value_offsets[h],
            view.header_value_offsets[h + 1] - view.header_value_offsets[h])
    return headers


@cython.final
cdef class HeadersColumn:
    """A lazy sequence of dict (str to bytes), one a record; empty where there are none."""
    cdef Batch batch

    def __len__(self):
        return self.batch.count

    def __getitem__(self, index):
        cdef Py_ssize_t i
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.batch.count))]
        i = index
        if i < 0:
            i += self.batch.count
        if i < 0 or i >= self.batch.count:
            raise IndexError(f"index {index} of a batch of {self.batch.count}")
        return headers_at(&self.batch.view, self.batch.first + <uint32_t>i)

    def __iter__(self):
        for i in range(self.batch.count):
            yield self[i]

    def __eq__(self, other):
        if isinstance(other, (list, tuple, HeadersColumn)):
            return len(other) == len(self) and list(self) == list(other)
        return NotImplemented

    __hash__ = None

    def __repr__(self):
        return f"<headers of {self.batch.count} records>"


@cython.final
@cython.freelist(16)
cdef class Batch:
    """Records of one partition that lie one behind the other, as columns. Read-only.

    A stored batch of 4 KiB or more is a view of the mapped file: nothing is copied and nothing is
    done per record.
    Small ones are gathered into one. Either stays valid as long as anything made from it is
    referenced, also when
    the store is closed or retention has removed the segment. `len(batch)` is the number of
    records, at least 1.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     stream = store.stream("s")
    ...     _ = stream.append_many([b"a", b"b"], keys=[b"k", None])
    ...     for batch in stream.read():
    ...         print(batch.offsets, list(batch.keys), list(batch.values))
    [0 1] [b'k', None] [b'a', b'b']
    """
    cdef ms_view view
    cdef uint32_t first
    cdef uint32_t count
    cdef readonly int32_t partition
    cdef readonly uint64_t epoch
    cdef object owner
    cdef BytesColumn made_values, made_keys  # a loop asks for them again and again

    def __len__(self):
        return self.count

    @property
    def first_offset(self):
        """Offset of the first record."""
        if self.view.offsets != NULL:
            return self.view.offsets[self.first]
        return self.view.base_offset + self.first

    @property
    def next_offset(self):
        """Offset after the last record: where to go on reading."""
        if self.view.offsets != NULL:
            return self.view.offsets[self.first + self.count - 1] + 1
        return self.view.base_offset + self.first + self.count

    @property
    def offsets(self):
        """NumPy int64: the offset of each record."""
        numpy = module_of("numpy")
        if self.view.offsets != NULL:
            return as_numpy(self.owner, self.view.offsets + self.first, self.count, "<i8", 8)
        start = self.view.base_offset + self.first
        offsets = numpy.arange(start, start + self.count, dtype="<i8")
        offsets.flags.writeable = False
        return offsets

    @property
    def timestamps(self):
        """NumPy int64: microseconds since 1970 UTC of each record (``.view("datetime64[us]")`` as
        dates)."""
        numpy = module_of("numpy")
        if self.view.timestamps != NULL:
            return as_numpy(self.owner, self.view.timestamps + self.first, self.count, "<i8", 8)
        filled = numpy.full(self.count, self.view.timestamp_min, "<i8")
        filled.flags.writeable = False
        return filled

    @property
    def keys(self):
        """The keys, a lazy sequence of bytes or None."""
        if self.made_keys is None:
            self.made_keys = column_view(self.owner, self.view.key_offsets, self.view.keys,
                                         self.view.key_validity, self.first, self.count)
        return self.made_keys

    @property
    def values(self):
        """The values, a lazy sequence of bytes or None (a tombstone)."""
        if self.made_values is None:
            self.made_values = column_view(self.owner, self.view.value_offsets, self.view.values,
                                           self.view.value_validity, self.first, self.count)
        return self.made_values

    @property
    def headers(self):
        """The headers, a lazy sequence of dict."""
        cdef HeadersColumn column = HeadersColumn.__new__(HeadersColumn)
        column.batch = self
        return column

    @property
    def nbytes(self):
        """Bytes of keys and values."""
        cdef uint32_t end = self.first + self.count
        if self.count == 0:  # one that `__new__` alone has made
            return 0
        cdef int64_t size = self.view.value_offsets[end] - self.view.value_offsets[self.first]
        if self.view.key_offsets != NULL:
            size += self.view.key_offsets[end] - self.view.key_offsets[self.first]
        return size

    def values_as(self, dtype):
        """View fixed-width values as one structured NumPy array, without a copy.

        Raises `InvalidArgument` where a value is null or has another length than `dtype.itemsize`.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     _ = store.stream("s").append_many([b"\\x01\\x00", b"\\x02\\x00"])
        ...     [batch] = store.stream("s").read()
        ...     batch.values_as("<u2")
        array([1, 2], dtype=uint16)
        """
        numpy = module_of("numpy")
        try:
            dtype = numpy.dtype(dtype)
        except TypeError as error:
            raise _errors.InvalidType(f"values_as({dtype!r}): {error}") from error
        cdef int32_t width = dtype.itemsize
        cdef const int32_t *offsets = self.view.value_offsets + self.first
        cdef uint32_t i
        cdef bint fits = self.view.value_validity == NULL or self.values.null_count == 0
        if self.view.flags & MS_BATCH_FIXED:
            fits = offsets[1] - offsets[0] == width
        elif fits:
            for i in range(self.count):
                fits = fits and offsets[i + 1] - offsets[i] == width
        if not fits or width == 0 or dtype.hasobject or self.count == 0:
            raise _errors.InvalidArgument(
                f"values_as({dtype}): the values of this batch are not all {width} bytes long")
        return as_numpy(self.owner, self.view.values + offsets[0], self.count, dtype, width)

    def __getitem__(self, index):
        """`batch[i:j]` is a batch of these records, without a copy."""
        if not isinstance(index, slice):
            raise TypeError("a batch is cut by slices; its columns are indexed")
        start, stop, step = index.indices(self.count)
        if step != 1 or stop <= start:
            raise _errors.InvalidArgument(
                f"batch[{index}]: expected a slice of at least one record and step 1")
        return self.cut(<uint32_t>start, <uint32_t>(stop - start))

    cdef Batch cut(self, uint32_t start, uint32_t count):
        cdef Batch batch = Batch.__new__(Batch)
        batch.view = self.view
        batch.first = self.first + start
        batch.count = count
        batch.partition = self.partition
        batch.epoch = self.epoch
        batch.owner = self.owner
        return batch

    def __repr__(self):
        return (f"<Batch of {self.count} records: partition {self.partition}, "
                f"offsets {self.first_offset} to {self.next_offset - 1}>")

    def __arrow_c_schema__(self):
        """The Arrow schema of every batch: partition, offset, timestamp, key, value."""
        return export_schema(MS_ARROW_DEFAULT)

    def __arrow_c_array__(self, requested_schema=None):
        """The batch as an Arrow struct array; keys and values are views of the file."""
        return export_array(self, MS_ARROW_DEFAULT)

    def __arrow_c_stream__(self, requested_schema=None):
        """The batch as an Arrow stream of one batch."""
        return export_stream(self, MS_ARROW_DEFAULT)

    def arrow(self, columns=("partition", "offset", "timestamp", "key", "value")):
        """Choose Arrow columns: an object with ``__arrow_c_array__``. Keys and values alone cost
        nothing a record."""
        return arrow_selection(self, columns)

    def to_arrow(self, columns=("partition", "offset", "timestamp", "key", "value")):
        """The batch as a ``pyarrow.RecordBatch``; `columns` may add "headers". Needs pyarrow."""
        pyarrow = module_of("pyarrow")
        return pyarrow.record_batch(arrow_selection(self, columns))


cdef dict ARROW_COLUMNS = {
    "partition": MS_ARROW_PARTITION, "offset": MS_ARROW_OFFSET, "timestamp": MS_ARROW_TIMESTAMP,
    "key": MS_ARROW_KEY, "value": MS_ARROW_VALUE, "headers": MS_ARROW_HEADERS,
}


@cython.final
cdef class ArrowSelection:
    """Some columns of a batch, for Arrow consumers."""
    cdef Batch batch
    cdef uint32_t columns

    def __repr__(self):
        names = ", ".join(name for name, bit in ARROW_COLUMNS.items() if self.columns & bit)
        return f"<Arrow columns {names} of {self.batch!r}>"

    def __arrow_c_schema__(self):
        return export_schema(self.columns)

    def __arrow_c_array__(self, requested_schema=None):
        return export_array(self.batch, self.columns)

    def __arrow_c_stream__(self, requested_schema=None):
        return export_stream(self.batch, self.columns)


cdef ArrowSelection arrow_selection(Batch batch, object columns):
    cdef ArrowSelection selection = ArrowSelection.__new__(ArrowSelection)
    selection.batch = batch
    for name in columns:
        if name not in ARROW_COLUMNS:
            raise _errors.InvalidArgument(
                f"no Arrow column {name!r}; there are {', '.join(ARROW_COLUMNS)}")
        selection.columns |= <uint32_t>ARROW_COLUMNS[name]
    return selection
