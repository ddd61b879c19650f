# Statuses to exceptions: one table from the core's list and errors.py; import fails if a class is
# missing.
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release,
                             PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.stdlib cimport free, getenv, malloc
from libc.string cimport memcpy, memset
cimport cython

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

from millstream import errors as _errors


cdef dict _build_errors():
    cdef const ms_status_row *row = ms_status_rows()
    table = {}
    while row.name != NULL:
        name = row.class_name.decode()
        if name and name not in _errors.__all__:
            raise ImportError(f"millstream.errors has no {name}")
        table[row.value] = name
        row += 1
    return table


cdef dict ERRORS = _build_errors()


cdef int fail(int status, const ms_error *err, object path) except -1:
    name = ERRORS[status]
    cls = getattr(_errors, name) if name else MemoryError
    cdef char *said = <char *>err.text
    text = said.decode("utf-8", "replace") if said[0] else "unknown status %d" % status
    if path:
        text = f"{path}: {text}"
    if cls is _errors.CorruptBatch:
        text += "; nothing was changed, see `millstream verify` and `millstream repair`"
        raise cls(text, path=path or "", position=err.position, expected=err.expected,
                  found=err.found)
    raise cls(text)


cdef inline int check(ms_status status, const ms_error *err) except -1 nogil:
    if status < 0:
        with gil:
            fail(status, err, None)
    return 0


def status_table():
    """The status list of the core: name to (value, class name, text)."""
    cdef const ms_status_row *row = ms_status_rows()
    table = {}
    while row.name != NULL:
        table[row.name.decode()] = (row.value, row.class_name.decode(), row.text.decode())
        row += 1
    return table


def format_fields():
    """Offsets as compiled: (struct, field, offset, size) a row; docs/format.md is held to it."""
    cdef const ms_format_field *row = ms_format_fields()
    rows = []
    while row.type != NULL:
        rows.append((row.type.decode(), row.field.decode(), row.offset, row.size))
        row += 1
    return rows
