"""Who may depend on whom, as data: each C file what is above it, each floor what is below.

`tests/check.py` holds every `#include "ms_..."` and every `import` of the package to these lists.
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
    "ms_compact",
    "ms_latest",
    "ms_producer",
    "ms_partition",
    "ms_arrow",
    "ms_ring",
    "ms_wheel",
    "ms_dedup",
    "ms_word",
    "ms_queue",
    "ms_slots",
    "ms_due",
    "ms_wait",
    "ms_hint",
    "ms_claim",
    "ms_bucket",
    "ms_ending",
    "ms_room",
    "ms_sweep",
    "ms_delivery",
    "ms_decide",
    "ms_recover",
    "ms_count",
    "ms_group",
    "ms_heartbeat",
)

# From the ground up: floor: what stands on it, each a module or a folder of millstream. A module
# knows what is below it and on its own floor, annotations included. Nothing points up.
FLOORS = {
    "words": (
        "errors",
        "greenlets",
        "address",
        "_native",
        "options",
        "codecs",
        "timestamps",
        "sleepers",
    ),
    "disk": ("disk",),
    "log": ("log",),
    "queues": ("queues",),
    "groups": ("groups",),
    "streams": ("streams",),
    "transactions": ("transactions",),
    "store": ("store",),
    "inspect": ("inspect",),
    "face": ("__init__", "testing", "worker", "compat"),
    "cli": ("cli",),
}

# Who knows less than its place allows: the second reader shares nothing with what it checks, and
# the command line is a user of the public face, but for the name of a file system.
ONLY = {
    "inspect": ("errors", "address"),
    "cli": ("__init__", "errors", "address", "options", "inspect", "disk"),
}

# (who reads, whose): how many `_names`, as `privates` of tests/rules.py counts them. Each change
# may only lower them.
PRIVATE: dict[tuple[str, str], int] = {
    ("queues", "words"): 3,
    ("groups", "words"): 2,
    ("streams", "words"): 4,
    ("transactions", "words"): 10,
    ("store", "words"): 3,
    ("groups", "log"): 31,
    ("streams", "log"): 11,
    ("transactions", "log"): 16,
    ("store", "log"): 29,
    ("transactions", "queues"): 30,
    ("store", "queues"): 14,
    ("face", "queues"): 5,
    ("transactions", "groups"): 9,
    ("store", "transactions"): 1,
    ("face", "store"): 1,
}
