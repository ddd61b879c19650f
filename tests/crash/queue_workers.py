"""What the processes of the queue's crash tests do; a line of history for each thing done.

`python queue_workers.py FUNCTION DIRECTORY ARGUMENTS`: `= id` was put, `- id` was acknowledged.
"""

import os
import sys
import threading

import millstream


def say(kind: str, number: int) -> None:
    os.write(1, b"%s %d\n" % (kind.encode(), number))


def produce(directory: str, first: str) -> None:
    with millstream.open(directory, durability="process") as store:
        q = store.queue("q", capacity=5000)
        number = int(first)
        while True:
            q.put(b"%d" % number, headers={"n": b"x"}, timeout=None)
            say("=", number)
            number += 1


def consume(directory: str) -> None:
    with millstream.open(directory, durability="process") as store:
        q = store.queue("q")
        while True:
            m = q.get(timeout=None)
            say("?", int(m.value))
            m.ack()
            say("-", int(m.value))


def hold(directory: str) -> None:
    with millstream.open(directory, durability="process") as store:
        m = store.queue("q").get(timeout=10)
        say("?", int(m.value))
        threading.Event().wait()  # to be killed


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
