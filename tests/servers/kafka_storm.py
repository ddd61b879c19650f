"""A relay to Kafka in a process of its own, which kills itself at a step of its transactions."""

import functools
import os
import signal

import millstream
from millstream.engines.kafka.connection import KafkaConnection
from millstream.engines.kafka.streams import Sending
from millstream.store.mirror import Mirror
from millstream.store.relay import Relay

STEPS = [
    (Relay, "_send", "before"),
    (KafkaConnection, "transaction", "before"),
    (Sending, "hand_over", "before"),
    (Sending, "hand_over", "after"),
    (Sending, "note", "after"),
    (Sending, "finish", "after"),
    (Relay, "_send", "after"),
]
"""Where it can be killed: of a class a method, before or behind it."""


BACK = [(Mirror, "_fetch", "after"), (Mirror, "_append", "before"), (Mirror, "_append", "after")]
"""Where a mirror can be."""


def kill_at(step, times):
    """Have this process killed at a step, when it comes there so many times."""
    kind, name, when = step
    work, left = getattr(kind, name), [times]

    @functools.wraps(work)
    def watched(*arguments, **options):
        left[0] -= 1
        if when == "before" and left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        found = work(*arguments, **options)
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(kind, name, watched)


def main(pipe, store, stream, url, step, times):
    """Relay until all is sent, or the step has come; None: none does."""
    if step is not None:
        kill_at(STEPS[step], times)
    with millstream.open(store) as opened, opened.relay(opened.stream(stream), to=url) as relay:
        pipe.send("ready")
        while relay.lag:
            relay.run(timeout=0.05)


def mirror(pipe, store, stream, url, step, times):
    """Fetch until nothing is left, or the step has come; None: none does."""
    if step is not None:
        kill_at(BACK[step], times)
    with millstream.open(store) as opened:
        into = opened.stream(stream)
        with opened.mirror(url, stream, into=into) as fetching:
            pipe.send("ready")
            while fetching.lag:
                fetching.run(timeout=0)
