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
    if not PyObject_CheckBuffer(item):
        raise _errors.InvalidType(
            f"{what} of element {row}: expected bytes-like or None, found {type(item).__name__}")
    if column.views == NULL:
        column.views = <Py_buffer *>PyMem_Calloc(column.count, sizeof(Py_buffer))
        if column.views == NULL:
            raise MemoryError
    try:
        PyObject_GetBuffer(item, &column.views[column.view_count], PyBUF_SIMPLE)
    except BufferError as error:
        raise _errors.InvalidType(
            f"{what} of element {row}: not contiguous bytes: {error}") from error
    out.data = <const uint8_t *>column.views[column.view_count].buf
    out.size = column.views[column.view_count].len
    column.view_count += 1
    return 0


cdef SliceColumn column_of_list(object items, str what):
    cdef Py_ssize_t i, count = len(items)
    cdef SliceColumn column = new_column(count)
    cdef ms_slice *out = column.slices
    cdef object item
    column.owners.append(items)
    for i in range(count):
        item = items[i]
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
    interface = array.__array_interface__
    shape = interface["shape"]
    typestr = interface["typestr"]
    if typestr[1] == "O":
        return column_of_list(array.tolist(), what)
    if typestr[1] == "U":
        raise _errors.InvalidType(
            f"{what}: an array of str; encode it first (numpy.strings.encode)")
    if len(shape) == 0:
        raise _errors.InvalidType(f"{what}: an array without dimensions; append it as one value")
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
    strip = strip and typestr[1] == "S"
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
        return column_of_list(list(items), what)
    except TypeError as error:
        raise _errors.InvalidType(f"{what}: expected a list, NumPy or Arrow array, found "
                                  f"{type(items).__name__}") from error


@cython.final
cdef class HeaderColumn:
    """Headers of many records, flat."""
    cdef uint32_t *starts
    cdef SliceColumn names
    cdef SliceColumn values

    def __dealloc__(self):
        PyMem_Free(self.starts)


cdef HeaderColumn headers_of(object headers, Py_ssize_t count):
    """One mapping for all records, or a sequence of mapping or None, one a record."""
    cdef HeaderColumn column = HeaderColumn.__new__(HeaderColumn)
    cdef Py_ssize_t i
    shared = hasattr(headers, "items")
    if not shared:
        if len(headers) != count:
            raise _errors.InvalidArgument(f"{len(headers)} headers for {count} values")
    column.starts = <uint32_t *>PyMem_Calloc(count + 1, sizeof(uint32_t))
    if column.starts == NULL:
        raise MemoryError
    names = []
    values = []
    for i in range(count):
        one = headers if shared else headers[i]
        if one is not None:
            if not hasattr(one, "items"):
                raise _errors.InvalidType(
                    f"headers of element {i}: expected a mapping of str to bytes, "
                    f"found {type(one).__name__}")
            for name, value in one.items():
                if type(name) is not str:
                    raise _errors.InvalidType(
                        f"header name of element {i}: expected str, found {type(name).__name__}")
                try:
                    names.append(name.encode("utf-8"))
                except UnicodeEncodeError as error:
                    raise _errors.InvalidArgument(f"header name of element {i}: {error}") from error
                if value is None:
                    raise _errors.InvalidType(
                        f"header {name!r} of element {i}: expected bytes, found None")
                values.append(value)
        column.starts[i + 1] = <uint32_t>len(names)
    column.names = column_of_list(names, "header name")
    column.values = column_of_list(values, "header value")
    return column
