"""Apache Kafka as an engine: ``millstream.open("kafka://127.0.0.1:9092")``.

A stream is a topic of the same name, a partition one of its partitions, a group the consumer group
of the same name; any client of Kafka reads them. The topic ``__millstream.NAME`` says how far the
producers of a stream are. It takes the client confluent-kafka.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.engines.kafka.store import KafkaStore

__all__ = ["open"]


def open(address: str | bytes, **options: Any) -> KafkaStore:
    """Open the store of a Kafka cluster; what `millstream.open` calls for ``kafka://``.

    Args:
        address: ``kafka://USER:PASSWORD@HOST:PORT``, or several of HOST:PORT with commas between;
            behind a ``?``: ``sasl`` (the mechanism for the user: PLAIN, the default, or
            SCRAM-SHA-256 or SCRAM-SHA-512), ``tls=yes``, and for it ``tls_ca``, ``tls_cert`` and
            ``tls_key`` (files).
        options: ``durability`` (of what is appended, where no call says another), ``mode`` ("rw" or
            "r"), ``timeout`` (seconds to wait for the server, default 5).

    Raises: StorageError, Unsupported, InvalidArgument; ImportError without confluent-kafka.
    """
    from millstream.engines.kafka.store import KafkaStore

    text = address.decode() if isinstance(address, bytes) else address
    options.pop("create", None)  # a server is there, or it is not
    return KafkaStore(text, **options)
