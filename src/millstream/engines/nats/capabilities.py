"""What NATS JetStream can do, as it was measured on 2.15.1."""

from __future__ import annotations

from millstream.capabilities import Capabilities, Capability

BATCH_MOST = 1000
"""Messages of one atomic batch, by the server's default."""
NATIVE = Capability("native")


def none(note: str) -> Capability:
    """What it cannot do, and what to do instead."""
    return Capability("none", note)


def of(version: str, synced: bool) -> Capabilities:
    """What a server of that version can do; `synced`: it syncs before it answers."""
    sync = none(
        "the server does not sync before it answers: set sync_interval: always in the jetstream"
        " block of its configuration, and say so in the address: ?sync_interval=always"
    )
    return Capabilities(
        f"nats {version}",
        {
            "stream.null": Capability("native", "a header says that it is null"),
            "stream.headers": Capability("native", "what no header line can have is in base64"),
            "stream.timestamp": Capability("native", "a header; the server's own time stays"),
            "stream.partitions": Capability("native", "a JetStream stream each"),
            "stream.add_partitions": none("make another stream with more, and copy"),
            "stream.atomic_append": Capability("native", limits={"records": BATCH_MOST}),
            "stream.start_at_offset": NATIVE,
            "stream.start_at_time": Capability("emulated", "the partition is read from its start"),
            "stream.get": NATIVE,
            "stream.group": Capability("native", "records changed by compare-and-set"),
            "stream.rebalance": Capability("native", "members are records with a time to live"),
            "stream.fenced_commit": Capability("native", "by compare-and-set"),
            "stream.retention": NATIVE,
            "stream.delete_before": NATIVE,
            "stream.compaction": none("read the stream into a local one that is compacted"),
            "stream.view": none("read the stream into a local one and view that"),
            "stream.producer": Capability(
                "native",
                "an expected last sequence of a subject; remembered as long as its last record",
            ),
            "stream.transaction": none("append_many is atomic within a partition"),
            "queue.priority": Capability("emulated", "a consumer each, asked in turn"),
            "queue.delay": Capability("native", "by schedules; not beside a capacity"),
            "queue.ttl": Capability("native", limits={"seconds_min": 1}),
            "queue.dedup": Capability("native", "the window is the queue's, 120 s by default"),
            "queue.key_order": none("one queue for each share of the keys, and one worker"),
            "queue.lease": NATIVE,
            "queue.fenced_ack": none(
                "the server accepts it and removes the message under its new holder; what is late"
                " by our clock raises LeaseLost, what is late on the way does not: be idempotent"
            ),
            "queue.extend": Capability("native", "it begins anew, as long as it was"),
            "queue.nack_delay": NATIVE,
            "queue.release": none("nack(), which counts"),
            "queue.attempts": NATIVE,
            "queue.hang_counted": NATIVE,
            "queue.dead_letters": Capability("native", "of a lease that ended: by an advisory"),
            "queue.redrive": Capability("native", "at least once"),
            "queue.peek": Capability("native", "what was never leased"),
            "queue.cancel": Capability("native", "of what was never leased; a delayed one until"
                                       " it is due"),
            "queue.purge": Capability("native", "of what was never leased"),
            "queue.depth": Capability("native", "what waits after a nack counts as leased"),
            "queue.capacity": Capability("native", "not beside delays"),
            "queue.pause": none("stop the workers"),
            "queue.worker": none("call get() in a loop of your own"),
            "queue.transaction": none("acknowledge behind the effect, and be idempotent"),
            "durability.process": NATIVE,
            "durability.interval": Capability("native", "sync_interval", limits={"seconds": 120}),
            "durability.sync": NATIVE if synced else sync,
        },
    )  # fmt: skip
