"""Streams, queues and transactions that the processes of one machine share, without a server.

A store is a directory. Any number of processes open it at once; what is in it outlives them all.

>>> import millstream
>>> with millstream.temporary() as store:  # or open("data"), which stays
...     flights = store.stream("flights", partitions=2)  # a log: each reader gets all of it
...     position = flights.append(b"EWR-IAH", key=b"N14228")
...     print([value for batch in flights.read() for value in batch.values])
...
...     mail = store.queue("mail")  # work: each message to one worker, until it is acknowledged
...     number = mail.put(b"to ann@example.org")
...     with mail.get(timeout=1) as message:  # the end of the block acknowledges
...         print(message.value)
...
...     with store.transaction() as tx:  # all of it, or nothing
...         tx.append(flights, b"LGA-IAH", key=b"N24211")
...         tx.put(mail, b"to bob@example.org")
[b'EWR-IAH']
b'to ann@example.org'

Where to begin:

- `open` and `temporary` give a `Store`; its `stream` and `queue` a `Stream` and a `Queue`.
- `Stream.append`, `append_many`, `read`, `get`, `consumer` (groups that share the work), `view`.
- `Queue.put`, `get`, `worker`; `run` works until SIGTERM, `Worker` until it is told to stop.
- `Store.transaction` spans all of them; `Store.pipe` is the loop around one.
- `MillstreamError` is the base of all errors; `errors` has their tree.
- How much an append survives is the store's `durability`: "process", "interval" or "sync".
- `codecs` for values that are not bytes, `compat` in place of `queue` and `multiprocessing`,
  `testing` for a clock to advance, `inspect` to verify and repair a store that nobody has open.
- Past one machine: `open("nats://127.0.0.1:4222")`, see `engines`; `Store.capabilities`.

The command line is `millstream --help`.
"""

import sys

from millstream import _native, errors
from millstream._native import Batch, Message, Position, Put, Record, Span
from millstream.errors import (
    Aborted,
    Closed,
    ConfigMismatch,
    CorruptBatch,
    Fenced,
    Indeterminate,
    InvalidArgument,
    InvalidType,
    LeaseLost,
    LimitExceeded,
    LockTimeout,
    MillstreamError,
    MillstreamWarning,
    NotFound,
    OffsetOutOfRange,
    Poisoned,
    Reentered,
    Reject,
    Retry,
    Snooze,
    StorageError,
    StoreFull,
    Unsupported,
    VersionMismatch,
    WaitTimeout,
    WorkerError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream import codecs as codecs
    from millstream import compat as compat
    from millstream import inspect as inspect
    from millstream import testing as testing
    from millstream.capabilities import Capability as Capability
    from millstream.groups.consumer import Consumer as Consumer
    from millstream.groups.group import Group as Group
    from millstream.groups.stats import GroupMember, GroupPartition, GroupStats
    from millstream.log.compaction import CompactionProgress, CompactionResult
    from millstream.options import Compaction as Compaction
    from millstream.options import Durability
    from millstream.options import Retention as Retention
    from millstream.options import RetryPolicy as RetryPolicy
    from millstream.queue_errors import Empty as Empty
    from millstream.queue_errors import QueueFull as QueueFull
    from millstream.queues import worker as worker
    from millstream.queues.dead_letters import DeadLetters as DeadLetters
    from millstream.queues.queue import Queue as Queue
    from millstream.queues.records import DeadLetter, QueueStats, StoredMessage
    from millstream.queues.worker import Worker as Worker
    from millstream.queues.worker import run as run
    from millstream.store.advice import Advice as Advice
    from millstream.store.mirror import Mirror as Mirror
    from millstream.store.relay import Relay as Relay
    from millstream.store.stats import StoreProcess, StoreStats
    from millstream.store.store import Store as Store
    from millstream.store.store import open as open
    from millstream.store.store import temporary as temporary
    from millstream.streams.producer import Producer as Producer
    from millstream.streams.stats import PartitionStats, StreamStats
    from millstream.streams.stream import Stream as Stream
    from millstream.streams.view import View as View
    from millstream.transactions.pipe import Pipe as Pipe
    from millstream.transactions.transaction import Transaction as Transaction

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "Advice",
    "Batch",
    "Capability",
    "Closed",
    "Compaction",
    "CompactionProgress",
    "CompactionResult",
    "ConfigMismatch",
    "Consumer",
    "CorruptBatch",
    "DeadLetter",
    "DeadLetters",
    "Durability",
    "Empty",
    "Fenced",
    "Group",
    "GroupMember",
    "GroupPartition",
    "GroupStats",
    "Indeterminate",
    "InvalidArgument",
    "InvalidType",
    "LeaseLost",
    "LimitExceeded",
    "LockTimeout",
    "Message",
    "MillstreamError",
    "MillstreamWarning",
    "Mirror",
    "NotFound",
    "OffsetOutOfRange",
    "PartitionStats",
    "Pipe",
    "Poisoned",
    "Position",
    "Producer",
    "Put",
    "Queue",
    "QueueFull",
    "QueueStats",
    "Record",
    "Reentered",
    "Reject",
    "Relay",
    "Retention",
    "Retry",
    "RetryPolicy",
    "Snooze",
    "Span",
    "StorageError",
    "Store",
    "StoreFull",
    "StoreProcess",
    "StoreStats",
    "StoredMessage",
    "Stream",
    "StreamStats",
    "Transaction",
    "Unsupported",
    "VersionMismatch",
    "View",
    "WaitTimeout",
    "Worker",
    "WorkerError",
    "__version__",
    "codecs",
    "compat",
    "errors",
    "inspect",
    "open",
    "run",
    "temporary",
    "testing",
    "worker",
]


_MODULES = ("codecs", "compat", "inspect", "testing", "worker")
_HOMES = {
    "capabilities": ("Capability",),
    "groups.consumer": ("Consumer",),
    "groups.group": ("Group",),
    "groups.stats": ("GroupMember", "GroupPartition", "GroupStats"),
    "log.compaction": ("CompactionProgress", "CompactionResult"),
    "queue_errors": ("Empty", "QueueFull"),
    "options": ("Compaction", "Durability", "Retention", "RetryPolicy"),
    "queues.dead_letters": ("DeadLetters",),
    "queues.queue": ("Queue",),
    "queues.records": ("DeadLetter", "QueueStats", "StoredMessage"),
    "queues.worker": ("Worker", "run"),
    "store.advice": ("Advice",),
    "store.mirror": ("Mirror",),
    "store.relay": ("Relay",),
    "store.stats": ("StoreProcess", "StoreStats"),
    "store.store": ("Store", "open", "temporary"),
    "streams.producer": ("Producer",),
    "streams.stats": ("PartitionStats", "StreamStats"),
    "streams.stream": ("Stream",),
    "streams.view": ("View",),
    "transactions.pipe": ("Pipe",),
    "transactions.transaction": ("Transaction",),
}


def __getattr__(name: str) -> object:
    """Import at its first use all but the errors and the values: the store, too."""
    home = name if name in _MODULES else next((h for h, ns in _HOMES.items() if name in ns), None)
    if home is None:
        raise AttributeError(f"module 'millstream' has no attribute {name!r}")
    path = f"millstream.{home}"
    module: object = sys.modules.get(path)
    if module is None or _is_under_way(module):
        asked_by = sys._getframe(1).f_code.co_name
        within = asked_by == "_handle_fromlist" and _native.loading.mine  # an import within another
        module = _import(path) if within else _import_alone(path)
    globals()[name] = found = module if name == home else getattr(module, name)
    return found


def _is_under_way(module: object) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _import_alone(path: str) -> object:
    with _native.loading:
        return _import(path)


def _import(path: str) -> object:
    if _is_under_way(sys.modules.get(path)):
        raise Reentered(f"{path}: is being imported by what a handler or finalizer interrupted")
    __import__(path)
    return sys.modules[path]


def __dir__() -> list[str]:
    return list(__all__)
