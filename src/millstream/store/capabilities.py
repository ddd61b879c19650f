"""What a store in a directory can do, in the words that all engines share."""

from __future__ import annotations

from millstream.capabilities import NAMES, Capabilities, Capability

__all__ = ["FILE"]

SAID: dict[str, Capability] = {
    "stream.retention": Capability("native", "whole segments go, the oldest first"),
    "stream.delete_before": Capability("native", "whole segments go"),
    "queue.capacity": Capability("native", limits={"messages": (1 << 24) - 2}),
    "queue.priority": Capability("native", limits={"priorities": 8}),
    "queue.attempts": Capability("native", limits={"attempts": 62}),
    "queue.lease": Capability("native", limits={"seconds_min": 0.001, "seconds_max": 2592000.0}),
    "durability.interval": Capability("native", limits={"seconds": 0.1}),
}

FILE = Capabilities("file", {name: SAID.get(name, Capability("native")) for name in NAMES})
"""All of it: the vocabulary is that of a store in a directory."""
