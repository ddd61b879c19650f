"""Time in tests: waiting for events, and bounds that hold on the slowest machine.

Nothing here says how fast the engine is; the benchmarks do. A test that tells an event from the
time-out behind it gives that time-out a minute or more, and the event `SOON`.
"""

import asyncio
import time

SOON = 20.0  # seconds: at once, on a machine that does ten other things


def until(condition, what="it", seconds=60.0):
    """Look again and again until something is so; what the condition gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.005)  # the one place that looks again: leaves the processor to what it awaits
    return found


async def auntil(condition, what="it", seconds=60.0):
    """`until` in a coroutine: the loop runs meanwhile."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        await asyncio.sleep(0.002)  # as in `until`
    return found


def least(work, tries=3):
    """Seconds of the quickest of a few runs of `work`, which must not be quicker than it may."""
    taken = []
    for _ in range(tries):
        began = time.monotonic()
        work()
        taken.append(time.monotonic() - began)
    return min(taken)
