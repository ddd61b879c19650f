"""A relay in a process of its own, which kills itself where it hurts most."""

import os
import random
import signal

import millstream
from millstream.engines.nats import store as _preloaded  # by the fork server, once for all
from millstream.store.relay import Relay

assert _preloaded


def main(pipe, store, stream, url, seed):
    """Relay until all is sent; with a seed one batch in two is the last one.

    The process then kills itself, before the batch is sent, or behind that and before its position
    is kept.
    """
    chance = random.Random(seed)
    send = Relay._send

    def sent(self, batch):
        fate = chance.random()
        if fate < 1 / 4:
            os.kill(os.getpid(), signal.SIGKILL)
        send(self, batch)
        if fate > 3 / 4:
            os.kill(os.getpid(), signal.SIGKILL)

    if seed:
        Relay._send = sent
    with millstream.open(store) as opened, opened.relay(opened.stream(stream), to=url) as relay:
        pipe.send("ready")
        while relay.lag:
            relay.run(timeout=0.05)
