"""What Kafka can do, as it was measured on 4.4.0."""

from __future__ import annotations

from millstream.capabilities import NAMES, Capabilities, Capability

YES = Capability("native")
LAG_MOST = 1000
"""Up to so many offsets behind a position are read, to count the records among them."""
NO_SYNC = (
    "the topic has not flush.messages=1, so the server does not sync before it answers: alter the"
    ' topic, or have it made by stream(durability="sync")'
)
NO_INTERVAL = "the server leaves it to the kernel when it writes; durability sync is there"
NO_QUEUE = (
    "share groups are not used: the Python client calls its own a preview, it can neither extend a"
    " lease nor give a message back uncounted, and an ack of a lost lease undoes the other acks of"
    " its commit; relay into a queue of nats:// or rabbitmq://, or read with a consumer group"
)


def none(note: str) -> Capability:
    """What it cannot do, and what to do instead."""
    return Capability("none", note)


def of(version: str) -> Capabilities:
    """What a cluster of that version can do."""
    known = {
        "stream.null": YES,
        "stream.headers": YES,
        "stream.timestamp": Capability("native", "milliseconds; a header has the microseconds"),
        "stream.partitions": YES,
        "stream.add_partitions": Capability("native", "keys move, as everywhere"),
        "stream.atomic_append": none("append in a transaction of the store, which is seen whole"),
        "stream.start_at_offset": YES,
        "stream.start_at_time": YES,
        "stream.get": YES,
        "stream.group": Capability(
            "native",
            "positions of a group without members are forgotten after the broker's"
            " offsets.retention.minutes, 7 days by default; sessions are bounded by its"
            " group.min.session.timeout.ms",
            limits={"session_seconds_min": 6},
        ),
        "stream.rebalance": YES,
        "stream.fenced_commit": Capability("native", "by the generation of the group"),
        "stream.retention": Capability("native", "by the age of records, and bytes; no count"),
        "stream.delete_before": YES,
        "stream.compaction": YES,
        "stream.view": none("mirror the stream into a local one and view that"),
        "stream.producer": Capability(
            "native", "records and position in one transaction; of records without a time limit"
        ),
        "stream.transaction": Capability("native", "streams and positions of groups"),
        "durability.process": YES,
        "durability.interval": none(NO_INTERVAL),
        "durability.sync": Capability(
            "native", 'of topics with flush.messages=1, as stream(durability="sync") makes them;'
            " refused of others"
        ),
    }  # fmt: skip
    known |= {name: none(NO_QUEUE) for name in NAMES if name.startswith("queue.")}
    return Capabilities(f"kafka {version}", known)
