"""Signals and finalizers at any instruction: `python reentry_storm.py KIND INTERRUPTIONS SEED`.

KIND "signals": a timer's handler; "finalizers": `__del__` in cycles, collected at nearly each
allocation of any thread, in the extension, too. Each makes one call, chosen by chance, in the
middle of whatever is under way. For test_reentry.py.
"""

import contextlib
import faulthandler
import gc
import random
import shutil
import signal
import sys
import tempfile
import time

import reentry_calls

SECONDS = 10.0


class Storm:
    """Calls in the middle of calls."""

    def __init__(self, world, seed):
        self.world = world
        self.chance = random.Random(seed)
        self.count = 0
        self.inside = False
        self.wrong = []
        self.inner = [name for name in reentry_calls.CALLS if name != "close"]

    def interrupt(self, *_):
        """What the handler does."""
        if self.inside:
            return
        self.inside = True
        name = self.chance.choice(self.inner)
        begun = time.monotonic()
        try:
            getattr(self.world, name)()
        except reentry_calls.FINE:
            pass
        except BaseException as error:
            self.wrong.append((name, repr(error)))
        finally:
            self.inside = False
        self.count += 1
        if time.monotonic() - begun > SECONDS:
            self.wrong.append((name, f"took {time.monotonic() - begun:.1f} s"))


class Ring:
    """Is collected as garbage only, and calls then."""

    def __init__(self, storm):
        self.storm, self.me = storm, self

    def __del__(self):
        self.storm.interrupt()


def main(kind, interruptions, seed):
    directory = tempfile.mkdtemp(prefix="storm-")
    world = reentry_calls.World(directory)
    storm = Storm(world, seed)
    for name in reentry_calls.CALLS:  # all is imported: test_reentry.py has the imports
        if name != "close":
            getattr(world, name)()
    outer = random.Random(seed + 1)
    faulthandler.dump_traceback_later(120, exit=True)
    if kind == "signals":
        signal.signal(signal.SIGALRM, storm.interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    else:
        gc.set_threshold(20, 2, 2)
    while storm.count < interruptions and not storm.wrong:
        if kind == "finalizers":
            for _ in range(3):
                Ring(storm)
        name = outer.choice(storm.inner)
        with contextlib.suppress(*reentry_calls.FINE):
            getattr(world, name)()
    signal.setitimer(signal.ITIMER_REAL, 0)
    storm.inside = True  # what is collected from here on calls nothing
    gc.set_threshold(700, 10, 10)
    world.store.close()
    faulthandler.cancel_dump_traceback_later()
    reentry_calls.check(world)
    shutil.rmtree(directory, ignore_errors=True)
    if storm.wrong:
        print(storm.wrong, file=sys.stderr)
    return len(storm.wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
