"""Functions that worker processes of the tests import by name."""

import os
import threading
import time
from pathlib import Path

import millstream


def note(message):
    """Leave a file that says who did it."""
    directory = Path(message.headers["to"].decode())
    (directory / f"{message.id}-{os.getpid()}").touch()


def note_all(messages):
    for message in messages:
        if message.value == b"bad":
            message.nack(reason="bad")
        else:
            note(message)


def slowly(message):
    note(message)
    threading.Event().wait()


def die_once(message):
    note(message)
    if message.attempt == 1:
        os.kill(os.getpid(), 9)


def refuse(message):
    raise millstream.Reject("not wanted")


def leave(message):
    note(message)
    raise SystemExit(3)


def run_with_signals(path, ready):
    """The main function of a process that is told to stop by a signal."""
    store = millstream.open(path)
    queue = store.queue("q")

    @queue.worker(concurrency=2)
    def work(message):
        Path(ready).touch()
        time.sleep(float(message.value))  # longer or shorter than the grace of a real process

    print(millstream.run(queue, grace=1), flush=True)
    store.close()


if __name__ == "__main__":
    import sys

    run_with_signals(*sys.argv[1:])
