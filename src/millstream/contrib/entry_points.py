"""What kombu loads as an entry point of its group for serializers: the alias ``millstream://``.

kombu has no group for transports, but it loads this one with its module of producers and consumers,
so all that is done here is to name the transport. It is imported with every program that has kombu
and millstream, and so stays as light as it can be.
"""

from kombu.transport import TRANSPORT_ALIASES
from kombu.utils.json import dumps, loads

__all__ = ["serializer"]

TRANSPORT_ALIASES.setdefault("millstream", "millstream.contrib.kombu:Transport")

serializer = (dumps, loads, "application/x-millstream", "utf-8")
"""The group wants a serializer: kombu's own JSON, under a content type that nothing else has."""
