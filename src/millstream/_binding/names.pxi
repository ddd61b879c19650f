# Public classes have one home, whatever module they are built into; pickles and tracebacks say it.
from cpython.object cimport PyTypeObject

(<PyTypeObject *>Batch).tp_name = "millstream.Batch"
(<PyTypeObject *>Message).tp_name = "millstream.Message"
(<PyTypeObject *>Position).tp_name = "millstream.Position"
(<PyTypeObject *>Put).tp_name = "millstream.Put"
(<PyTypeObject *>Record).tp_name = "millstream.Record"
(<PyTypeObject *>Span).tp_name = "millstream.Span"
Put._again.__module__ = "millstream"
