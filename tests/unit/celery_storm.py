"""A storm of kills over workers and producers of Celery; a program of its own, which forks them.

``python celery_storm.py DIRECTORY KILLS SEED`` prints its counts as JSON. A producer notes a task
once `delay` has returned; each of these must be run, as often as it likes.
"""

import contextlib
import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

from celery import chain, chord
from celery_app import make
from timing import until

import millstream

POOLS = ("prefork", "prefork", "threads")


def forked(work):
    """A child in a group of its own that does this and nothing behind it."""
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def children_of(process):
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


class Storm:
    def __init__(self, directory, seed):
        self.directory = directory
        self.url = f"millstream://{directory}/store"
        self.random = random.Random(seed)
        self.sent, self.done = directory / "sent", directory / "done"
        self.started = 0
        self.kills = Counter()
        self.begun = []

    def work(self):
        self.started += 1
        name, pool = f"w{self.started}@storm", POOLS[self.started % len(POOLS)]

        def run():
            log = os.open(self.directory / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            app = make(self.url, task_reject_on_worker_lost=True)
            options = ["-P", pool, "-c", "2", "-n", name, "-l", "WARNING", "--without-mingle"]
            app.worker_main(["worker", *options, "--without-gossip"])

        self.begun.append(forked(run))
        return self.begun[-1]

    def produce(self):
        self.started += 1
        first = self.started * 100_000

        def run():
            app = make(self.url)
            note = app.tasks["note"]
            queue = app.backend._broker.queue("celery")
            sent = os.open(self.sent, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for number in range(first, first + 100_000):
                if number % 10 == 8:
                    chain(note.si(str(self.done), f"{number}a"), self.note(note, number)).delay()
                elif number % 10 == 9:
                    parts = [note.si(str(self.done), f"{number}{part}") for part in "abc"]
                    chord(parts)(self.note(note, number))
                else:
                    self.note(note, number).delay()
                os.write(sent, f"{number}\n".encode())
                until(lambda: len(queue) < 200, "the workers' keeping up")

        self.begun.append(forked(run))
        return self.begun[-1]

    def lines(self):
        return self.done.read_bytes().count(b"\n") if self.done.exists() else 0

    def note(self, note, number):
        return note.si(str(self.done), str(number))

    def kill(self, process, kind):
        """All of it, or its first process alone, or one of its children alone."""
        how = "producer" if kind == "producer" else self.random.choice(["all", "parent", "child"])
        children = children_of(process)
        if how == "child" and children:
            os.kill(self.random.choice(children), signal.SIGKILL)
            self.kills["a child of a worker"] += 1
            return process
        if how == "parent":
            os.kill(process, signal.SIGKILL)  # its children notice, and end when their task does
        else:
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        self.kills[kind if how != "parent" else "the parent of a worker"] += 1
        return self.work() if kind == "worker" else self.produce()

    def run(self, kills):
        slots = {"worker": [self.work(), self.work()], "producer": [self.produce()]}
        for _ in range(kills):
            more = self.lines() + self.random.choice([0, 1, 10, 50])
            until(lambda more=more: self.lines() >= more, "work going on")
            kind = self.random.choice(["worker", "worker", "producer"])
            processes = slots[kind]
            index = self.random.randrange(len(processes))
            processes[index] = self.kill(processes[index], kind)
        for process in slots["producer"]:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        with millstream.open(self.directory / "store") as store:
            queue = store.queue("celery", create=False)
            until(lambda: queue.stats().unfinished == 0, "finishing", 90.0)
            dead, redelivered = queue.stats().dead, queue.stats().redelivered
        for process in slots["worker"]:
            os.kill(process, signal.SIGTERM)
            os.waitpid(process, 0)
        sent = self.sent.read_text().split()
        done = Counter(self.done.read_text().split())
        return {
            "kills": dict(self.kills),
            "sent": len(sent),
            "run": sum(done.values()),
            "run more than once": sum(count > 1 for count in done.values()),
            "redelivered": redelivered,
            "dead": dead,
            "lost": sorted(set(sent) - set(done)),
        }


if __name__ == "__main__":
    storm = Storm(Path(sys.argv[1]), int(sys.argv[3]))
    try:
        print(json.dumps(storm.run(int(sys.argv[2]))))
    finally:
        for process in storm.begun:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
