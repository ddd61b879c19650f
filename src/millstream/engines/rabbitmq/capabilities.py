"""What RabbitMQ can do, as it was measured on 4.3.6."""

from __future__ import annotations

from millstream.capabilities import Capabilities, Capability

HAS = Capability("native")
FRAME_BYTES = 1_000_000
"""Bytes of records that fit in a frame of the stream protocol."""
PRIORITIES = 32


def none(note: str) -> Capability:
    """What it cannot do, and what to do instead."""
    return Capability("none", note)


def of(version: str) -> Capabilities:
    """What a server of that version can do."""
    return Capabilities(
        f"rabbitmq {version}",
        {
            "stream.null": Capability("native", "a property says that it is null"),
            "stream.headers": Capability("native", "application properties"),
            "stream.timestamp": Capability("native", "a property; the server's own time stays"),
            "stream.partitions": Capability("native", "those of a super stream"),
            "stream.add_partitions": none("make another stream with more, and copy"),
            "stream.atomic_append": Capability(
                "native", "one entry", limits={"bytes": FRAME_BYTES, "records": 65_535}
            ),
            "stream.start_at_offset": HAS,
            "stream.start_at_time": Capability("emulated", "the partition is read from its start"),
            "stream.get": HAS,
            "stream.group": Capability("native", "a stream of changes, by compare-and-set"),
            "stream.rebalance": Capability("native", "members say in that stream that they live"),
            "stream.fenced_commit": Capability("native", "by compare-and-set"),
            "stream.retention": Capability("native", "by age and bytes; whole segments go"),
            "stream.delete_before": none("a retention, or another stream"),
            "stream.compaction": none("read the stream into a local one that is compacted"),
            "stream.view": none("read the stream into a local one and view that"),
            "stream.producer": Capability("native", "publishing ids; one more than the sequence"),
            "stream.transaction": none("append_many is atomic within a partition"),
            "queue.priority": Capability("native", limits={"priorities": PRIORITIES}),
            "queue.delay": none("keep it in a queue of a directory, whose relay sends what is due"),
            "queue.ttl": Capability("native", "what is too old goes to the dead letters"),
            "queue.dedup": none("let the reader be idempotent by a header of its own"),
            "queue.key_order": none("one queue for each share of the keys, and one worker"),
            "queue.lease": HAS,
            "queue.fenced_ack": Capability("native", "the server ignores it, and we see that"),
            "queue.extend": none("a longer lease"),
            "queue.nack_delay": none(
                "the server waits `backoff` of the queue's RetryPolicy times the failures, up to"
                " its `max_delay`"
            ),
            "queue.release": Capability("native", "at once, without a delay"),
            "queue.attempts": Capability("native", "failures and lost connections"),
            "queue.hang_counted": none(
                "the server counts no lease that ran out; the header x-acquired-count of RabbitMQ"
                " says how often a message was taken"
            ),
            "queue.dead_letters": Capability("native", "after a lost connection without a reason"),
            "queue.redrive": Capability("native", "at least once"),
            "queue.peek": none("get() and release() it"),
            "queue.cancel": none("get() it, and ack()"),
            "queue.purge": Capability("native", "of what waits"),
            "queue.depth": Capability(
                "native", "what waits and what is dead; the server does not tell what is leased"
            ),
            "queue.capacity": none(
                "the server passes max-length by one, and once full takes nothing until a fifth of"
                " it is free: set a policy of its own; puts that it refuses raise QueueFull"
            ),
            "queue.pause": none("stop the workers"),
            "queue.worker": none("call get() in a loop of your own"),
            "queue.transaction": none("acknowledge behind the effect, and be idempotent"),
            "durability.process": HAS,
            "durability.interval": Capability("native", "of queues; streams are never synced"),
            "durability.sync": Capability("native", "of queues; streams are never synced"),
        },
    )
