"""NATS JetStream as an engine: ``millstream.open("nats://127.0.0.1:4222")``.

A partition of a stream is a JetStream stream: ``orders``, then ``orders~1``, ... of the subjects
``orders.0``, ``orders.1``; offset n is its sequence n + 1. A queue is a work-queue stream
``queue~mail`` with a consumer for each priority, its dead letters a stream ``dead~mail``. Positions
of groups are records of a stream ``groups~orders`` that are changed by compare-and-set.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.engines.nats.store import NatsStore

__all__ = ["open"]


def open(address: str | bytes, **options: Any) -> NatsStore:
    """Open the store of a NATS server; what `millstream.open` calls for ``nats://``.

    Args:
        address: ``nats://USER:PASSWORD@HOST:PORT``; behind a ``?``: ``tls_ca``, ``tls_cert`` and
            ``tls_key`` (files), ``token``, ``creds`` (a file), ``sync_interval=always`` where the
            server is configured so.
        options: ``durability`` (of what is appended and put, where no call says another), ``mode``
            ("rw" or "r"), ``timeout`` (seconds to wait for the server, default 5).

    Raises: StorageError, Unsupported, InvalidArgument; ImportError without nats-py.
    """
    from millstream.engines.nats.store import NatsStore

    text = address.decode() if isinstance(address, bytes) else address
    options.pop("create", None)  # a server is there, or it is not
    return NatsStore(text, **options)
