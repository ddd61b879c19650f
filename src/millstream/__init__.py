"""Streams that the processes of one machine share, in a directory, without a broker."""

from millstream._native import Batch, Message, Position, Span
from millstream.errors import (
    Aborted,
    Closed,
    ConfigMismatch,
    CorruptBatch,
    Empty,
    Fenced,
    Indeterminate,
    InvalidArgument,
    InvalidType,
    LeaseLost,
    LimitExceeded,
    LockTimeout,
    MillstreamError,
    NotFound,
    OffsetOutOfRange,
    Poisoned,
    QueueFull,
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
from millstream.options import Compaction, Retention, RetryPolicy
from millstream.store import Store, open, temporary
from millstream.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream import inspect as inspect
    from millstream.advice import Advice as Advice
    from millstream.compaction import CompactionProgress, CompactionResult
    from millstream.consumer import Consumer as Consumer
    from millstream.group import Group as Group
    from millstream.growth import MillstreamWarning as MillstreamWarning
    from millstream.options import Durability
    from millstream.pipe import Pipe as Pipe
    from millstream.producer import Producer as Producer
    from millstream.queue import Queue as Queue
    from millstream.queue_records import DeadLetter, QueueStats, StoredMessage
    from millstream.stats import PartitionStats, StreamStats
    from millstream.transaction import Transaction as Transaction
    from millstream.view import View as View
    from millstream.worker import run as run

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "Advice",
    "Batch",
    "Closed",
    "Compaction",
    "CompactionProgress",
    "CompactionResult",
    "ConfigMismatch",
    "Consumer",
    "CorruptBatch",
    "DeadLetter",
    "Durability",
    "Empty",
    "Fenced",
    "Group",
    "Indeterminate",
    "InvalidArgument",
    "InvalidType",
    "LeaseLost",
    "LimitExceeded",
    "LockTimeout",
    "Message",
    "MillstreamError",
    "MillstreamWarning",
    "NotFound",
    "OffsetOutOfRange",
    "PartitionStats",
    "Pipe",
    "Poisoned",
    "Position",
    "Producer",
    "Queue",
    "QueueFull",
    "QueueStats",
    "Reentered",
    "Reject",
    "Retention",
    "Retry",
    "RetryPolicy",
    "Snooze",
    "Span",
    "StorageError",
    "Store",
    "StoreFull",
    "StoredMessage",
    "Stream",
    "StreamStats",
    "Transaction",
    "Unsupported",
    "VersionMismatch",
    "View",
    "WaitTimeout",
    "WorkerError",
    "__version__",
    "open",
    "run",
    "temporary",
]


def __getattr__(name: str) -> object:
    """Import at their first use what few programs need."""
    import importlib

    if name == "inspect":
        return importlib.import_module("millstream.inspect")
    if name in ("CompactionProgress", "CompactionResult"):
        return getattr(importlib.import_module("millstream.compaction"), name)
    if name == "Durability":
        return importlib.import_module("millstream.options").Durability
    if name == "Producer":
        return importlib.import_module("millstream.producer").Producer
    if name == "MillstreamWarning":
        return importlib.import_module("millstream.growth").MillstreamWarning
    if name in ("Advice", "Consumer", "Group", "Pipe", "Transaction"):
        return getattr(importlib.import_module(f"millstream.{name.lower()}"), name)
    if name == "Queue":
        return importlib.import_module("millstream.queue").Queue
    if name == "View":
        return importlib.import_module("millstream.view").View
    if name == "run":
        return importlib.import_module("millstream.worker").run
    if name in ("DeadLetter", "QueueStats", "StoredMessage"):
        return getattr(importlib.import_module("millstream.queue_records"), name)
    if name in ("PartitionStats", "StreamStats"):
        return getattr(importlib.import_module("millstream.stats"), name)
    raise AttributeError(f"module 'millstream' has no attribute {name!r}")
