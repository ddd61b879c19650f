"""RabbitMQ as an engine: ``millstream.open("rabbitmq://127.0.0.1:5672")``.

A stream ``orders`` is a super stream; its partitions are the streams ``orders.0``, ``orders.1``,
... A queue ``mail`` is the quorum queue ``mail``, its dead letters lie in ``mail.dead``. What was
made, and with which settings, the stream of its settings says; positions of groups are in another
one for each stream. Both are logs whose records name what they replace (`table`).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.engines.rabbitmq.store import RabbitStore

__all__ = ["open"]


def open(address: str | bytes, **options: Any) -> RabbitStore:
    """Open the store of a RabbitMQ server; what `millstream.open` calls for ``rabbitmq://``.

    Args:
        address: ``rabbitmq://USER:PASSWORD@HOST:PORT/VHOST``; behind a ``?``: ``stream_port``
            (default 5552, with TLS 5551), ``tls_ca``, ``tls_cert`` and ``tls_key`` (files).
        options: ``durability`` (of what is appended and put, where no call says another), ``mode``
            ("rw" or "r"), ``timeout`` (seconds to wait for the server, default 5).

    Raises: StorageError, Unsupported, InvalidArgument; ImportError without pika or rstream.
    """
    from millstream.engines.rabbitmq.store import RabbitStore

    text = address.decode() if isinstance(address, bytes) else address
    options.pop("create", None)  # a server is there, or it is not
    return RabbitStore(text, **options)
