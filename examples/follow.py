"""Follow a stream with asyncio while a thread appends to it.

Run it: `python examples/follow.py`.
"""

import asyncio
import threading
import time

import millstream

TICKS = 20


def tick(clock: millstream.Stream) -> None:
    """Append a reading of the clock now and then."""
    for number in range(TICKS):
        clock.append(b"%d" % time.perf_counter_ns(), headers={"tick": b"%d" % number})
        time.sleep(0.01)


async def follow(clock: millstream.Stream) -> list[float]:
    """Return how long each tick took to come here, in microseconds."""
    delays: list[float] = []
    async for batch in clock.aread(follow=True, max_records=TICKS, timeout=10):
        now = time.perf_counter_ns()
        for value, headers in zip(batch.values, batch.headers, strict=True):
            delays.append((now - int(value)) / 1000)
            print(f"tick {headers['tick'].decode():>2} after {delays[-1]:7.0f} us")
    return delays


async def other_work() -> int:
    """What the event loop does meanwhile: waiting for a record does not block it."""
    turns = 0
    while True:
        try:
            await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            return turns
        turns += 1


async def run(clock: millstream.Stream) -> None:
    beside = asyncio.create_task(other_work())
    ticking = threading.Thread(target=tick, args=(clock,))
    ticking.start()
    delays = sorted(await follow(clock))
    ticking.join()
    beside.cancel()
    turns = await beside
    print(f"{len(delays)} ticks, median {delays[len(delays) // 2]:.0f} us; the loop went on")
    print(f"with other work {turns} times")


def main() -> None:
    with millstream.temporary() as store:
        asyncio.run(run(store.stream("clock")))


if __name__ == "__main__":
    main()
