"""How long something takes: the least of a few tries, since a busy machine makes one long."""

import time

TRIES = 5


def least(work, tries=TRIES):
    """Seconds of the quickest of a few runs of `work`."""
    taken = []
    for _ in range(tries):
        began = time.monotonic()
        work()
        taken.append(time.monotonic() - began)
    return min(taken)
