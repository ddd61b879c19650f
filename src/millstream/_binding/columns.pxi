# Columns that a caller hands in, as slices: lists, NumPy arrays, Arrow arrays, headers, timestamps.
@cython.final
cdef class SliceColumn:
    """One slice a row, and what keeps their bytes alive."""
    cdef ms_slice *slices
    cdef Py_ssize_t count
    cdef list owners
    cdef Py_buffer *views
    cdef Py_ssize_t view_count

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.view_count):
            PyBuffer_Release(&self.views[i])
        PyMem_Free(self.views)
        PyMem_Free(self.slices)

    def __len__(self):
        return self.count


cdef SliceColumn new_column(Py_ssize_t count):
    cdef SliceColumn column = SliceColumn.__new__(SliceColumn)
    column.slices = <ms_slice *>PyMem_Malloc((count + 1) * sizeof(ms_slice))
    if column.slices == NULL:
        raise MemoryError
    column.count = count
    column.owners = []
    return column


cdef int slice_buffer(SliceColumn column, object item, ms_slice *out, str what,
        Py_ssize_t row) except -1:
    """A bytes-like object that is not bytes: hold its buffer."""
    if type(item) is not bytearray and type(item) is not memoryview:
        refuse_mask(item, what)
    if not PyObject_CheckBuffer(item):
        raise _errors.InvalidType(
            f"{what} of element {row}: expected bytes-like or None, found {type(item).__name__}")
    if column.views == NULL:
        column.views = <Py_buffer *>PyMem_Calloc(column.count, sizeof(Py_buffer))
        if column.views == NULL:
            raise MemoryError
    try:
        PyObject_GetBuffer(item, &column.views[column.view_count], PyBUF_SIMPLE)
    except (BufferError, ValueError) as error:  # NumPy raises ValueError
        raise _errors.InvalidType(
            f"{what} of element {row}: not contiguous bytes: {error}") from error
    out.data = <const uint8_t *>column.views[column.view_count].buf
    out.size = column.views[column.view_count].len
    column.view_count += 1
    return 0


cdef SliceColumn column_of_list(object items, str what):
    # Another thread may change the list while the append waits: hold the elements, not the list.
    cdef tuple rows = tuple(items)
    cdef Py_ssize_t i, count = len(rows)
    cdef SliceColumn column = new_column(count)
    cdef ms_slice *out = column.slices
    cdef object item
    column.owners.append(rows)
    for i in range(count):
        item = rows[i]
        if type(item) is bytes:
            out[i].data = <const uint8_t *>PyBytes_AS_STRING(item)
            out[i].size = PyBytes_GET_SIZE(item)
        elif item is None:
            out[i].data = NULL
            out[i].size = -1
        else:
            slice_buffer(column, item, &out[i], what, i)
    return column


cdef SliceColumn column_of_array(object array, str what, bint strip):
    """A NumPy array: one element (or row, of more dimensions) a slice. `strip`: 'S' without
    padding."""
    numpy = module_of("numpy")
    refuse_mask(array, what)
    array = numpy.asarray(array)
    interface = array.__array_interface__
    shape = interface["shape"]
    kind = array.dtype.kind
    if len(shape) == 0:
        raise _errors.InvalidType(f"{what}: an array without dimensions; append it as one value")
    if kind == "O":
        return column_of_list(array.tolist(), what)
    if kind == "U" or kind == "T":
        raise _errors.InvalidType(
            f"{what}: an array of str; encode it first (numpy.strings.encode)")
    if array.dtype.hasobject:
        raise _errors.InvalidType(f"{what}: elements of {array.dtype} hold Python objects")
    cdef Py_ssize_t i, count = shape[0], width = array.itemsize, stride
    if len(shape) > 1:
        for i in range(1, len(shape)):
            width *= shape[i]
        if count and not array[0].flags.c_contiguous:
            raise _errors.InvalidType(f"{what}: the rows of the array are not contiguous")
    strides = interface["strides"]
    stride = width if strides is None else strides[0]
    cdef SliceColumn column = new_column(count)
    cdef ms_slice *out = column.slices
    cdef const uint8_t *data = <const uint8_t *><size_t>interface["data"][0]
    cdef Py_ssize_t size
    column.owners.append(array)
    strip = strip and kind == "S"
    for i in range(count):
        size = width
        if strip:
            while size > 0 and data[i * stride + size - 1] == 0:
                size -= 1
        out[i].data = data + i * stride
        out[i].size = size
    return column


cdef SliceColumn column_of(object items, str what, bint strip=False):
    """Anything that can be a column of values or keys."""
    if type(items) is list or type(items) is tuple:
        return column_of_list(items, what)
    if hasattr(items, "__array_interface__"):
        return column_of_array(items, what, strip)
    if hasattr(items, "__arrow_c_array__") or hasattr(items, "__arrow_c_stream__"):
        return import_column(items)
    if isinstance(items, (bytes, bytearray, memoryview, str)):
        raise _errors.InvalidType(
            f"{what}: expected a sequence of bytes-like, found one {type(items).__name__}; "
            "append() takes a single value")
    try:
        items = iter(items)
    except TypeError as error:
        raise _errors.InvalidType(f"{what}: expected a list, NumPy or Arrow array, found "
                                  f"{type(items).__name__}") from error
    return column_of_list(items, what)


@cython.final
cdef class HeaderColumn:
    """Headers of many records, flat."""
    cdef uint32_t *starts
    cdef SliceColumn names
    cdef SliceColumn values

    def __dealloc__(self):
        PyMem_Free(self.starts)


cdef int add_headers(object headers, Py_ssize_t row, list names, list values) except -1:
    """Add the headers of one record, checked, to the flat lists."""
    if headers is None:
        return 0
    if not hasattr(headers, "items"):
        raise _errors.InvalidType(
            f"headers of element {row}: expected a mapping of str to bytes, "
            f"found {type(headers).__name__}")
    for name, value in headers.items():
        if not isinstance(name, str):
            raise _errors.InvalidType(
                f"header name of element {row}: expected str, found {type(name).__name__}")
        if not PyObject_CheckBuffer(value):
            raise _errors.InvalidType(f"header {name!r} of element {row}: expected bytes-like, "
                                      f"found {type(value).__name__}")
        try:
            names.append(name.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise _errors.InvalidArgument(f"header name of element {row}: {error}") from error
        values.append(value)
    return 0


cdef HeaderColumn headers_of(object headers, Py_ssize_t count):
    """One mapping for all records, or a sequence of mapping or None, one a record."""
    cdef HeaderColumn column = HeaderColumn.__new__(HeaderColumn)
    cdef Py_ssize_t i
    cdef list names = [], values = []
    cdef tuple rows = ()
    shared = hasattr(headers, "items")
    if not shared:
        try:
            rows = tuple(headers)
        except TypeError as error:
            raise _errors.InvalidType("headers: expected a mapping, or a sequence of mappings, "
                                      f"found {type(headers).__name__}") from error
        if len(rows) != count:
            raise _errors.InvalidArgument(f"{len(rows)} headers for {count} values")
    column.starts = <uint32_t *>PyMem_Calloc(count + 1, sizeof(uint32_t))
    if column.starts == NULL:
        raise MemoryError
    if shared:
        add_headers(headers, 0, names, values)
        for i in range(count):
            column.starts[i + 1] = <uint32_t>((i + 1) * len(names))
        names *= count
        values *= count
    else:
        for i in range(count):
            add_headers(rows[i], i, names, values)
            column.starts[i + 1] = <uint32_t>len(names)
    column.names = column_of_list(names, "header name")
    column.values = column_of_list(values, "header value")
    return column
