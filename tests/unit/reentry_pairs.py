"""Every public call within every other one: `python reentry_pairs.py DIRECTORY SHARE SEED`.

The calls are those of every_call.py. Each is made under a trace that stops it at lines all over it,
as a signal's handler would, and makes others there: one of SHARE of them, chosen by the seed (1:
all). Each comes back within seconds: it works, or raises what is documented. For test_reentry.py.
"""

import asyncio
import contextlib
import faulthandler
import os
import sys
import time

import every_call

SECONDS = 10.0  # what waits for its own caller waits for ever, or 30 s
POINTS = 8
COROUTINES = ("aget", "aput", "apoll", "aread")


class Interrupt(every_call.Interrupt):
    """Calls `handler` at one line of the package; 0: counts them."""

    def __init__(self, at, handler=None):
        super().__init__(0)
        self.stop_at, self.handler = at, handler

    def __call__(self, frame, event, arg):
        kept = super().__call__(frame, event, arg)
        if kept is not None and event == "line" and self.count == self.stop_at:
            sys.settrace(None)
            self.where = f"{frame.f_code.co_filename[len(every_call.PACKAGE) :]}:{frame.f_lineno}"
            self.handler(self.where)
        return kept


def main(path, share, seed):
    world = every_call.World(os.path.join(path, "store"))
    findings = every_call.Findings()
    calls = {name: entry for name, entry in every_call.CALLS.items() if entry is not None}
    names = list(calls)
    turn, pairs = seed, 0

    def make(outer, inner, where):
        began = time.monotonic()
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        findings.run(
            f"{outer} at {where}: {inner}", lambda: calls[inner](world)(), contextlib.nullcontext()
        )
        faulthandler.cancel_dump_traceback_later()
        if (took := time.monotonic() - began) > SECONDS:
            findings.note(inner, f"took {took:.1f} s in {outer} at {where}")

    for number, outer in enumerate(names):
        with Interrupt(0) as lines:
            findings.run(outer, calls[outer](world), contextlib.nullcontext())
        chosen = [inner for at, inner in enumerate(names) if (at + number + seed) % share == 0]
        points = min(POINTS if share == 1 else 2, len(chosen), max(1, lines.count))
        for point in range(points):
            at = 1 + (turn := turn + 7919) % max(1, lines.count)
            within = chosen[point::points]
            pairs += len(within)

            def handler(where, outer=outer, within=within):
                running = asyncio._get_running_loop() is not None
                for inner in within:
                    if running and any(name in inner for name in COROUTINES):
                        continue  # asyncio itself refuses a loop within a loop
                    make(outer, inner, where)

            call = calls[outer](world)
            findings.run(f"{outer}, interrupted", call, Interrupt(at, handler))
    world.end()
    every_call.verified(world, findings)
    print(pairs, "pairs of", len(names) ** 2)
    return min(findings.count, 100)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
