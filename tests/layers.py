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
        "queue_errors",
        "greenlets",
        "address",
        "_native",
        "frozen",
        "options",
        "capabilities",
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
    "engines": ("engines",),
    "contrib": ("contrib",),
    "cli": ("cli",),
}

# Who knows less than its place allows: the second reader shares nothing with what it checks, the
# drop-ins for frameworks use the public face as anybody does, the engines of servers add to it the
# parts that belong to no engine (how a batch is built, a key hashed, an argument read), and the
# command line is a user of it and its words, but for the name of a file system.
ONLY = {
    "inspect": ("errors", "address"),
    "engines": (
        *("__init__", "_native", "errors", "queue_errors", "capabilities"),
        *("options", "timestamps", "codecs"),
    ),
    "contrib": ("__init__", "testing"),
    "cli": ("__init__", "errors", "address", "options", "inspect", "disk", "contrib"),
}

# Files of one floor whose functions and classes serve one object, and so name its class in their
# annotations, while its file imports them: the whole, and its parts. They are taken apart to be
# read one by one, not to be used without it (docs/decisions/0013). Without these, annotations lead
# in no circle either. Each change may only take from the list. (`errors` names the two of queues,
# which are imported at their first use.)
PARTS = {
    "queue_errors": ("errors",),
    "groups.consumer": ("of_stream", "sql_position"),
    "log.handle": ("eras", "partition", "producer_ids", "reader", "sequences"),
    "log.partition": ("ahead", "recovery", "sequences"),
    "log.segments": ("cache",),
    "queues.handle": ("capacity", "dedup"),
    "queues.queue": ("dead_letters", "loops", "worker", "worker_processes"),
    "queues.slots": ("dedup",),
    "store.store": ("advice", "background", "backup", "compactor", "stats", "transactions"),
    "streams.stream": ("producer", "stats", "view", "view_snapshot"),
    "transactions.journal": ("holdings",),
    "transactions.transaction": ("commit", "holdings"),
}

# Why a floor reads `_names` of one below it: {reason: {"floor below._name": how often}}, counted by
# `privates` of tests/rules.py. Each change may only lower them.
PRIVATE: dict[str, dict[str, int]] = {
    "Users hold `Stream`, which inherits its handle: its files and settings, for floors above.": {
        "log._time_at": 2,
        "log._all_figures": 4,
        "log._alter": 2,
        "log._check_live": 2,
        "log._compaction": 3,
        "log._dispose": 6,
        "log._durability": 5,
        "log._groups": 1,
        "log._is_surprise": 3,
        "log._keep_up": 5,
        "log._log": 18,
        "log._opened": 4,
        "log._partition": 2,
        "log._partitions_of": 1,
        "log._point_out": 4,
        "log._retention": 2,
        "log._retire": 1,
        "log._set_state": 1,
        "log._state": 5,
        "log._stream_id": 11,
    },
    "The same handle's waiting: a consumer and a view sleep on the words of its control file.": {
        "log._prepare_wait": 1,
        "log._wait": 1,
        "log._wake": 6,
    },
    "What a transaction appends goes by the routing of the handle, without the checks of a call.": {
        "log._append_share": 1,
        "log._turn_of": 2,
    },
    "What a transaction does to a queue beside `put` and `ack`; no user may do half of it.": {
        "queues._acked": 1,
        "queues._cancel": 1,
        "queues._config": 4,
        "queues._decide": 3,
        "queues._dedup": 1,
        "queues._dedup_key": 1,
        "queues._encoded": 1,
        "queues._fate_of": 2,
        "queues._find": 2,
        "queues._forget": 1,
        "queues._prepare_ack": 1,
        "queues._prepare_put": 2,
        "queues._queue_id": 2,
        "queues._set_undecided": 2,
        "queues._state": 3,
        "queues._wipe": 1,
        "queues._withdraw_undecided": 2,
    },
    "Opening, closing and the background, of a queue's handle; users have `close` of the store.": {
        "queues._dispose": 1,
        "queues._expect": 1,
        "queues._drop": 1,
        "queues._sync_at_close": 1,
        "queues._sync_in_background": 1,
    },
    "Who waits for several queues, or for room, sleeps on the words of each.": {
        "queues._announce": 2,
        "queues._sleep": 2,
        "queues._upkeep": 1,
    },
    "Advice and the drop-ins read of messages what `stats` does not give: it costs a scan.": {
        "queues._counts": 3,
        "queues._failure": 1,
        "queues._holders": 1,
        "queues._never_leased": 1,
        "queues._participants": 1,
        "queues._record": 2,
        "queues._scan": 2,
    },
    "What a transaction does to a consumer: positions go with the commit, or back.": {
        "groups._await_log": 1,
        "groups._group_id": 1,
        "groups._member": 4,
        "groups._most": 1,
        "groups._rewind": 1,
        "groups._sql": 1,
    },
    "Numbers of a store for who asks every second, each read once.": {
        "groups._readers": 1,
        "groups._stats_of": 1,
    },
    "Classes of the extension are bases of public ones: hooks for the floors that inherit.": {
        "words._DedupTable": 3,
        "words._adopt": 1,
        "words._apply": 2,
        "words._arguments": 1,
        "words._configure_level": 1,
        "words._decide": 1,
        "words._dump": 1,
        "words._group_id": 1,
        "words._load": 1,
        "words._observe": 2,
        "words._pending": 1,
        "words._queue_id": 1,
        "words._revert": 2,
        "words._set_position": 1,
        "words._state": 1,
        "words._undo_ack": 1,
    },
    "What one owner calls once, and no user: a store at its end, a drop-in for where it is.": {
        "store._place": 1,
        "transactions._abandon": 1,
    },
}
