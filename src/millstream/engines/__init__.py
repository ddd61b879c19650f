"""The same API past one machine: streams and queues of servers, behind `millstream.open`.

``millstream.open("nats://127.0.0.1:4222")`` gives a `Store` of that server. The engines are the
real ones; nothing distributed is built here. `Store.capabilities` says of each capability whether
the engine has it, whether it is emulated, or that it is refused.

A package of others adds an engine by an entry point of the group ``millstream.engines``: its name
is the scheme, its object a function with the arguments of `millstream.open`, which returns a
`Store`. `conformance` of `millstream.testing` has the cases for it.
"""

from millstream.engines.protocols import (
    Consumer,
    DeadLetters,
    Group,
    Message,
    Producer,
    Queue,
    Store,
    Stream,
)

__all__ = ["Consumer", "DeadLetters", "Group", "Message", "Producer", "Queue", "Store", "Stream"]
