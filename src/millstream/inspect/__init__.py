"""The second reader: the formats in plain Python, numpy and xxhash, for verify, dump and repair.

Shares no code with the core, and only `repair` writes. It trusts no byte: every length is checked
before it is used, at most one batch is in memory, and files are read, not mapped, so that one that
shrinks ends in an error and not in a signal. Names in the structs are those of docs/format.md.

Threads: every function stands alone; any thread, any process, beside living writers too.
"""

from millstream.inspect.catalog import SegmentInfo, StoreInfo, StreamInfo
from millstream.inspect.checking import Report, verify
from millstream.inspect.columns import Batch
from millstream.inspect.layout import Finding, Note, Problem
from millstream.inspect.mending import Action, repair
from millstream.inspect.queue_layout import Failure, Message
from millstream.inspect.reading import Record, batches, dump, messages, records, store

__all__ = [
    "Action",
    "Batch",
    "Failure",
    "Finding",
    "Message",
    "Note",
    "Problem",
    "Record",
    "Report",
    "SegmentInfo",
    "StoreInfo",
    "StreamInfo",
    "batches",
    "dump",
    "messages",
    "records",
    "repair",
    "store",
    "verify",
]

# Public names have one home, whatever file they are in; pickles and tracebacks say it.
for _name in __all__:
    if callable(globals()[_name]):  # a union of types has no home
        globals()[_name].__module__ = __name__
del _name
