# Arrow: batches as PyCapsules, foreign tables and columns as slices. One C module, ms_arrow.
#
# Lifetime of an export: the batch's owner is a pin, one reference that goes with the C structs.
# Their release, in whatever thread, puts it on a list; drain_pins() lets go of what is there. It
# runs at each export, and whoever reads calls it too.
# Lifetime of an import: a chunk holds the foreign array until it is freed; slices point into it.

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport INT64_MAX
from libc.string cimport strcmp


cdef extern from "ms_arrow.h" nogil:
    cdef struct ArrowSchema:
        const char *format
        const char *name
        int64_t n_children
        ArrowSchema **children
        void (*release)(ArrowSchema *) noexcept nogil

    cdef struct ArrowArray:
        int64_t length
        int64_t offset
        ArrowArray **children
        void (*release)(ArrowArray *) noexcept nogil

    cdef struct ArrowArrayStream:
        int (*get_schema)(ArrowArrayStream *, ArrowSchema *) noexcept nogil
        int (*get_next)(ArrowArrayStream *, ArrowArray *) noexcept nogil
        const char *(*get_last_error)(ArrowArrayStream *) noexcept nogil
        void (*release)(ArrowArrayStream *) noexcept nogil

    enum:
        MS_ARROW_PARTITION
        MS_ARROW_OFFSET
        MS_ARROW_TIMESTAMP
        MS_ARROW_KEY
        MS_ARROW_VALUE
        MS_ARROW_HEADERS
        MS_ARROW_DEFAULT
        MS_ARROW_ALL

    ctypedef struct ms_arrow_source:
        ms_view view
        uint32_t first
        uint32_t count
        int32_t partition
        uint32_t columns
        void *pin

    ctypedef struct ms_arrow_pin:
        ms_arrow_pin *next
        void *pin

    ms_status ms_arrow_export_schema(ArrowSchema *out, uint32_t columns, ms_error *err)
    ms_status ms_arrow_export_array(const ms_arrow_source *source, ArrowArray *out, ms_error *err)
    ms_status ms_arrow_export_stream(const ms_arrow_source *source, ArrowArrayStream *out,
                                     ms_error *err)
    ms_arrow_pin *ms_arrow_take_released()
    void ms_arrow_pin_free(ms_arrow_pin *released)
    ms_status ms_arrow_check_slices(const ArrowSchema *schema, ms_error *err)
    ms_status ms_arrow_check_timestamps(const ArrowSchema *schema, ms_error *err)
    ms_status ms_arrow_check_struct(const ArrowSchema *schema, const ArrowArray *array,
                                    ms_error *err)
    ms_status ms_arrow_import_slices(const ArrowSchema *schema, const ArrowArray *array,
                                     uint64_t first, uint64_t count, ms_slice *out, ms_error *err)
    ms_status ms_arrow_import_timestamps(const ArrowSchema *schema, const ArrowArray *array,
                                         uint64_t first, uint64_t count, int64_t *out,
                                         ms_error *err)
    int64_t ms_arrow_find_child(const ArrowSchema *schema, const char *name)


# --- out ------------------------------------------------------------------------------------------

cdef void drain_pins() noexcept:
    """Let go of what consumers of exports have released since the last call."""
    cdef ms_arrow_pin *released = ms_arrow_take_released()
    cdef ms_arrow_pin *after
    while released != NULL:
        after = released.next
        Py_DECREF(<object> released.pin)
        ms_arrow_pin_free(released)
        released = after


cdef void free_schema_capsule(object capsule) noexcept:
    cdef ArrowSchema *schema = <ArrowSchema *> PyCapsule_GetPointer(capsule, b"arrow_schema")
    if schema.release != NULL:  # nobody has moved it out
        schema.release(schema)
    PyMem_Free(schema)


cdef void free_array_capsule(object capsule) noexcept:
    cdef ArrowArray *array = <ArrowArray *> PyCapsule_GetPointer(capsule, b"arrow_array")
    if array.release != NULL:
        array.release(array)
    PyMem_Free(array)


cdef void free_stream_capsule(object capsule) noexcept:
    cdef ArrowArrayStream *stream
    stream = <ArrowArrayStream *> PyCapsule_GetPointer(capsule, b"arrow_array_stream")
    if stream.release != NULL:
        stream.release(stream)
    PyMem_Free(stream)


cdef void *make_struct(size_t size) except NULL:
    """Return zeroed memory: a released struct of the interface, until an export fills it."""
    cdef void *memory = PyMem_Malloc(size)
    if memory == NULL:
        raise MemoryError
    memset(memory, 0, size)
    return memory


cdef object export_schema(uint32_t columns):
    """Return a capsule `arrow_schema` of the columns."""
    cdef ms_error err
    cdef ArrowSchema *schema = <ArrowSchema *> make_struct(sizeof(ArrowSchema))
    capsule = PyCapsule_New(schema, b"arrow_schema", free_schema_capsule)
    check(ms_arrow_export_schema(schema, columns, &err), &err)
    return capsule


cdef ms_arrow_source source_of(Batch batch, uint32_t columns):
    """Return the records as the core wants them; the pin is borrowed."""
    cdef ms_arrow_source source
    source.view = batch.view
    source.first = batch.first
    source.count = batch.count
    source.partition = batch.partition
    source.columns = columns
    source.pin = <void *> batch.owner
    return source


cdef object export_array(Batch batch, uint32_t columns):
    """Return capsules `arrow_schema` and `arrow_array` of a batch."""
    cdef ms_error err
    cdef ms_arrow_source source = source_of(batch, columns)
    drain_pins()
    schema = export_schema(columns)
    cdef ArrowArray *array = <ArrowArray *> make_struct(sizeof(ArrowArray))
    capsule = PyCapsule_New(array, b"arrow_array", free_array_capsule)
    check(ms_arrow_export_array(&source, array, &err), &err)
    Py_INCREF(batch.owner)  # the export's from now on; it is not released before we return
    return schema, capsule


cdef object export_stream(Batch batch, uint32_t columns):
    """Return a capsule `arrow_array_stream` of exactly this batch."""
    cdef ms_error err
    cdef ms_arrow_source source = source_of(batch, columns)
    drain_pins()
    cdef ArrowArrayStream *stream = <ArrowArrayStream *> make_struct(sizeof(ArrowArrayStream))
    capsule = PyCapsule_New(stream, b"arrow_array_stream", free_stream_capsule)
    check(ms_arrow_export_stream(&source, stream, &err), &err)
    Py_INCREF(batch.owner)
    return capsule


# --- in: chunks of anything that speaks the PyCapsule interface -----------------------------------

@cython.final
cdef class ArrowInput:
    """A foreign table or column: its schema, and its chunks one by one."""

    cdef ArrowSchema schema
    cdef ArrowArrayStream stream  # released when `data` gave a single array, or has ended
    cdef ArrowArray array         # that single array, until it is taken
    cdef bint is_struct

    def __dealloc__(self):
        if self.array.release != NULL:
            self.array.release(&self.array)
        if self.stream.release != NULL:
            self.stream.release(&self.stream)
        if self.schema.release != NULL:
            self.schema.release(&self.schema)

    cdef int take_array(self, object capsules) except -1:
        cdef ArrowSchema *schema
        cdef ArrowArray *array
        schema = <ArrowSchema *> PyCapsule_GetPointer(capsules[0], b"arrow_schema")
        array = <ArrowArray *> PyCapsule_GetPointer(capsules[1], b"arrow_array")
        self.schema = schema[0]
        schema.release = NULL  # moved: the capsules free the empty structs
        self.array = array[0]
        array.release = NULL
        return 0

    cdef int take_stream(self, object capsule) except -1:
        cdef ArrowArrayStream *stream
        cdef int error
        stream = <ArrowArrayStream *> PyCapsule_GetPointer(capsule, b"arrow_array_stream")
        self.stream = stream[0]
        stream.release = NULL
        if self.stream.release == NULL:
            raise _errors.InvalidArgument("the Arrow stream was consumed before")
        with nogil:
            error = self.stream.get_schema(&self.stream, &self.schema)
        return self.stream_result(error)

    cdef int stream_result(self, int error) except -1:
        if error == 0:
            return 0
        cdef const char *text = self.stream.get_last_error(&self.stream)
        said = "" if text == NULL else ": " + (<bytes> text).decode("utf-8", "replace")
        raise _errors.InvalidArgument(f"the Arrow stream failed with error {error}{said}")

    cdef ArrowChunk next_chunk(self):
        """Return the next chunk that is not empty, or None."""
        cdef ArrowChunk chunk
        cdef ms_error err
        cdef int error
        while True:
            chunk = ArrowChunk.__new__(ArrowChunk)
            if self.array.release != NULL:
                chunk.array = self.array
                self.array.release = NULL
            elif self.stream.release != NULL:
                with nogil:  # a stream may compute, or run Python on its own
                    error = self.stream.get_next(&self.stream, &chunk.array)
                self.stream_result(error)
            if chunk.array.release == NULL:
                return None
            chunk.input = self
            if self.is_struct:
                check(ms_arrow_check_struct(&self.schema, &chunk.array, &err), &err)
            if chunk.array.length > 0:
                chunk.count = <uint64_t> chunk.array.length
                return chunk

    cdef int64_t find_column(self, str name) except -1:
        """Return the index of a column by its name."""
        cdef bytes encoded = name.encode()
        cdef int64_t found = ms_arrow_find_child(&self.schema, encoded)
        if found >= 0:
            return found
        if found == -2:
            raise _errors.InvalidArgument(f"several columns are named {name!r}")
        names = []
        for i in range(self.schema.n_children):
            if self.schema.children[i].name != NULL:
                names.append((<bytes> self.schema.children[i].name).decode("utf-8", "replace"))
        there = ", ".join(names) or "none"
        raise _errors.InvalidArgument(f"no column is named {name!r}; there are {there}")


cdef ArrowInput open_arrow(object data):
    """Return an input of anything with __arrow_c_array__ or __arrow_c_stream__."""
    cdef ArrowInput source = ArrowInput.__new__(ArrowInput)
    method = getattr(data, "__arrow_c_array__", None)
    if method is not None:
        source.take_array(method())
    else:
        method = getattr(data, "__arrow_c_stream__", None)
        if method is None:
            raise _errors.InvalidType(
                f"{type(data).__name__} is no Arrow data: it has neither __arrow_c_stream__ nor "
                "__arrow_c_array__"
            )
        source.take_stream(method())
    if source.schema.release == NULL or source.schema.format == NULL:
        raise _errors.InvalidArgument("the Arrow data was consumed before")
    source.is_struct = strcmp(source.schema.format, b"+s") == 0
    return source


@cython.final
cdef class ArrowChunk:
    """Consecutive rows of an input as slices. They point into the foreign array, kept with them."""

    cdef ArrowInput input
    cdef ArrowArray array
    cdef uint64_t count
    cdef ms_slice *values
    cdef ms_slice *keys        # NULL: no keys
    cdef int64_t *timestamps   # NULL: no timestamps

    def __dealloc__(self):
        free(self.values)
        free(self.keys)
        free(self.timestamps)
        if self.array.release != NULL:
            self.array.release(&self.array)

    def __len__(self):
        return self.count

    cdef int import_slices(self, int64_t column, ms_slice *out) except -1:
        """Fill out[0, count) from a column; -1 is the array itself."""
        cdef const ArrowSchema *schema = &self.input.schema
        cdef const ArrowArray *array = &self.array
        cdef uint64_t first = 0
        cdef ms_error err
        if column >= 0:
            schema = schema.children[column]
            first = <uint64_t> array.offset
            array = array.children[column]
        with nogil:
            check(ms_arrow_import_slices(schema, array, first, self.count, out, &err), &err)
        return 0

    cdef int import_timestamps(self, int64_t column, int64_t *out) except -1:
        """Fill out[0, count) from a column; -1 is the array itself."""
        cdef const ArrowSchema *schema = &self.input.schema
        cdef const ArrowArray *array = &self.array
        cdef uint64_t first = 0
        cdef ms_error err
        if column >= 0:
            schema = schema.children[column]
            first = <uint64_t> array.offset
            array = array.children[column]
        with nogil:
            check(ms_arrow_import_timestamps(schema, array, first, self.count, out, &err), &err)
        return 0


cdef void *make_column(uint64_t count, size_t element_bytes) except NULL:
    """Return memory for a column of a chunk; freed with free()."""
    cdef void *memory = NULL
    if count < <uint64_t> INT64_MAX // element_bytes:
        memory = malloc((count + 1) * element_bytes)
    if memory == NULL:
        raise MemoryError(f"no memory for {count} elements")
    return memory


@cython.final
cdef class ArrowRows:
    """Iterator over the chunks of a table, with the named columns as slices."""

    cdef ArrowInput input
    cdef int64_t value
    cdef int64_t key        # below 0: none
    cdef int64_t timestamp  # below 0: none

    def __iter__(self):
        return self

    def __next__(self):
        cdef ArrowChunk chunk = self.next_chunk()
        if chunk is None:
            raise StopIteration
        return chunk

    cdef ArrowChunk next_chunk(self):
        """Return the next chunk with its columns filled, or None."""
        cdef ArrowChunk chunk = self.input.next_chunk()
        if chunk is None:
            return None
        chunk.values = <ms_slice *> make_column(chunk.count, sizeof(ms_slice))
        chunk.import_slices(self.value, chunk.values)
        if self.key >= 0:
            chunk.keys = <ms_slice *> make_column(chunk.count, sizeof(ms_slice))
            chunk.import_slices(self.key, chunk.keys)
        if self.timestamp >= 0:
            chunk.timestamps = <int64_t *> make_column(chunk.count, sizeof(int64_t))
            chunk.import_timestamps(self.timestamp, chunk.timestamps)
        return chunk


cdef ArrowRows import_arrow(object data, str value, str key, str timestamp):
    """Return the chunks of a table with these columns; key and timestamp may be None.

    Names and types are checked now, content chunk by chunk. Without columns (an array, a series)
    the data are the values themselves, and `value` is not read.
    """
    cdef ms_error err
    cdef ArrowRows rows = ArrowRows.__new__(ArrowRows)
    cdef ArrowInput source = open_arrow(data)
    rows.input = source
    rows.value = rows.key = rows.timestamp = -1
    if not source.is_struct:
        for name in (key, timestamp):
            if name is not None:
                raise _errors.InvalidArgument(
                    f"no column is named {name!r}: the data are a single column without a name"
                )
        check(ms_arrow_check_slices(&source.schema, &err), &err)
        return rows
    if value is None:
        raise _errors.InvalidArgument("value= must name the column of values")
    rows.value = source.find_column(value)
    check(ms_arrow_check_slices(source.schema.children[rows.value], &err), &err)
    if key is not None:
        rows.key = source.find_column(key)
        check(ms_arrow_check_slices(source.schema.children[rows.key], &err), &err)
    if timestamp is not None:
        rows.timestamp = source.find_column(timestamp)
        check(ms_arrow_check_timestamps(source.schema.children[rows.timestamp], &err), &err)
    return rows


# --- in: single columns ---------------------------------------------------------------------------

cdef object column_chunks(ArrowInput source, uint64_t *out_count):
    """Return the chunks of a column, and how many elements they have together."""
    cdef ArrowChunk chunk = source.next_chunk()
    chunks = []
    out_count[0] = 0
    while chunk is not None:
        out_count[0] += chunk.count
        chunks.append(chunk)
        chunk = source.next_chunk()
    return chunks


cdef SliceColumn import_column(object data):
    """Return an Arrow array, chunked array or series as slices; the column owns the chunks."""
    cdef ms_error err
    cdef ArrowInput source = open_arrow(data)
    cdef ArrowChunk chunk
    cdef uint64_t used = 0, count = 0
    check(ms_arrow_check_slices(&source.schema, &err), &err)
    chunks = column_chunks(source, &count)
    cdef SliceColumn column = new_column(<Py_ssize_t> count)
    for item in chunks:
        chunk = <ArrowChunk> item
        chunk.import_slices(-1, column.slices + used)
        used += chunk.count
    column.owners.extend(chunks)
    return column


@cython.final
cdef class TimestampColumn:
    """Microseconds since 1970, one a record; its buffer is int64 after int64."""

    cdef int64_t *timestamps
    cdef Py_ssize_t count

    def __dealloc__(self):
        free(self.timestamps)

    def __len__(self):
        return self.count

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.timestamps, self.count * 8, 1, flags)


def arrow_timestamps(data):
    """Return an Arrow array, chunked array or series as a `TimestampColumn`, a copy."""
    cdef ms_error err
    cdef ArrowInput source = open_arrow(data)
    cdef TimestampColumn column = TimestampColumn.__new__(TimestampColumn)
    cdef ArrowChunk chunk
    cdef uint64_t used = 0, count = 0
    check(ms_arrow_check_timestamps(&source.schema, &err), &err)
    chunks = column_chunks(source, &count)
    column.timestamps = <int64_t *> make_column(count, sizeof(int64_t))
    column.count = <Py_ssize_t> count
    for item in chunks:
        chunk = <ArrowChunk> item
        chunk.import_timestamps(-1, column.timestamps + used)
        used += chunk.count
    return column
