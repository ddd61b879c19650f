#!/usr/bin/env bash
# CPython: a wait with a time-out that a signal handler outlasts. queue.SimpleQueue.get waits on for ever;
# signal.sigtimedwait returns, in place of None, a struct that nobody has filled.
#
# Guess: as PEP 475 says, a call that a signal interrupted is begun again with the time that is left, and is over
# (queue.Empty, None) where none is: so do Lock.acquire, Condition.wait, Thread.join, queue.Queue.get, select.poll.
# Seen (CPython 3.11.7): what is left is negative then. SimpleQueue.get(timeout=0.1) hands that to
# PyThread_acquire_lock_timed, where it means "for ever": 2 seconds later it still waits, and only a second signal whose
# handler raises ends it. sigtimedwait(..., 0.1) leaves its loop with a siginfo that was never written: bytes of the
# stack. What waits by SimpleQueue for work and for signals at once stands still behind the first slow handler.
# So: never wait with a time-out by SimpleQueue.get in a main thread that has signal handlers; take queue.Queue, a lock
# or a futex.
#
# Hangs nothing: the second signal comes after 2 seconds, and `timeout` ends all after 20. No package, no root.
# Ends with 0 while that is so, 1 when it changed.
set -euo pipefail
timeout 20 python3 - <<'PY'
import queue
import select
import signal
import sys
import threading
import time

LEAST, END = 0.1, 2.0  # seconds: of each wait; until a handler raises


class StillWaiting(Exception):
    pass


def seen(wait):
    """What a wait of 0.1 s comes to, and how long it took, where a handler takes 0.3 s."""
    calls = []

    def handler(*_):
        calls.append(1)
        if len(calls) > 1:
            raise StillWaiting
        time.sleep(0.3)

    signal.signal(signal.SIGALRM, handler)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, LEAST / 2, END)
    try:
        found = wait()
    except (queue.Empty, StillWaiting) as error:
        found = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found, time.monotonic() - began


lock = threading.Lock()
lock.acquire()
waits = {
    "Lock.acquire": lambda: lock.acquire(timeout=LEAST),
    "Queue.get": lambda: queue.Queue().get(timeout=LEAST),
    "poll": lambda: select.poll().poll(LEAST * 1000),
    "SimpleQueue.get": lambda: queue.SimpleQueue().get(timeout=LEAST),
    "sigtimedwait": lambda: signal.sigtimedwait([signal.SIGUSR2], LEAST) is not None,
}
print("CPython", sys.version.split()[0])
found = {}
for name, wait in waits.items():
    found[name], seconds = seen(wait)
    print(f"{name}: {found[name]!r} after {seconds:.1f} s")
expected = {"Lock.acquire": False, "Queue.get": "Empty", "poll": [], "SimpleQueue.get": "StillWaiting"}
sys.exit(found != {**expected, "sigtimedwait": True})
PY
