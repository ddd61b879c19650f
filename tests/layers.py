"""Who may depend on whom, as data: each name knows only the names above it in its list.

`tests/check.py` holds every `#include "ms_..."` and every `import` of the package to these lists;
a new file is added here first.
"""

# One entry per pair csrc/NAME.[ch].
C_LAYERS = (
    "ms_platform",
    "ms_status",
    "ms_xxh3",
    "ms_owner",
    "ms_format",
    "ms_batch",
    "ms_segment",
    "ms_producer",
    "ms_partition",
    "ms_arrow",
    "ms_ring",
    "ms_wheel",
    "ms_dedup",
    "ms_queue",
    "ms_queue_parts",
    "ms_claim",
    "ms_bucket",
    "ms_delivery",
    "ms_decide",
    "ms_sweep",
    "ms_group",
    "ms_heartbeat",
)

# One entry per module or subpackage of millstream; `__init__` re-exports and is above all rules.
PYTHON_LAYERS = (
    "errors",
    "options",
    "codecs",
    "_native",
    "loops",
    "worker",
    "timestamps",
    "files",
    "reserve",
    "producer_ids",
    "settings",
    "control",
    "members",
    "recovery",
    "sequences",
    "cache",
    "segment_file",
    "segments",
    "background",
    "reader",
    "stats",
    "producer",
    "group",
    "queue_settings",
    "queue_records",
    "dedup",
    "slots",
    "capacity",
    "queue_waiter",
    "queue_handle",
    "dead_letters",
    "queue",
    "store_queues",
    "store_groups",
    "sql_position",
    "assignment",
    "consumer",
    "stream_groups",
    "stream",
    "journal",
    "transaction",
    "pipe",
    "store_transactions",
    "queue_backup",
    "backup",
    "store",
    "compat",
    "testing",
    "inspect",
    "cli",
)

# Exceptions, which know less than their place allows: the second reader shares nothing with what
# it checks, and the command line is a user of the public face.
PYTHON_ONLY = {
    "inspect": ("errors",),
    "cli": ("__init__", "errors", "options", "inspect"),
}
