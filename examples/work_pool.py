"""A pool of worker processes: every job is done, although one worker is killed on the way.

What the killed one had is delivered again at once, to another. So a job may be done twice; its
result is stored once all the same, since it is put with the job's number as its `dedup_id`.

Run it: `python examples/work_pool.py`.
"""

import logging
import os
import signal
import tempfile
import time

import millstream
from millstream.worker import Worker

JOBS = 300
RESULTS: dict[str, millstream.Queue] = {}


def results_of(path: str) -> millstream.Queue:
    """The queue of results: each process opens the store once."""
    if path not in RESULTS:
        RESULTS[path] = millstream.open(path).queue("results", dedup_window=3600.0)
    return RESULTS[path]


def square(message: millstream.Message) -> None:
    """Do one job, slowly. Processes import this function by its name."""
    number = int(message.value)
    time.sleep(0.005)
    results = results_of(message.headers["store"].decode())
    results.put(b"%d %d" % (number, number**2), dedup_id=f"{number}")


def main() -> None:
    logging.getLogger("millstream").setLevel(logging.ERROR)  # it would tell of the killed one
    with (
        tempfile.TemporaryDirectory() as path,
        millstream.open(path, durability="process") as store,
    ):
        jobs = store.queue("jobs")
        results = store.queue("results", dedup_window=3600.0)
        where = {"store": path.encode()}
        jobs.put_many([millstream.Put(b"%d" % number, headers=where) for number in range(JOBS)])

        with Worker(jobs, square, concurrency=3, mode="process") as pool:
            while len(results) < JOBS // 4:
                time.sleep(0.01)
            victim = pool.pids[0]
            os.kill(victim, signal.SIGKILL)
            print(f"killed one of {len(pool.pids)} workers after {len(results)} results")
            jobs.join(timeout=60)

        found: dict[int, int] = {}
        for message in results.get_many(10 * JOBS, timeout=0):
            number, squared = map(int, message.value.split())
            if number in found:
                raise SystemExit(f"TWICE: the result of job {number}")
            found[number] = squared
            message.ack()
        if found != {number: number**2 for number in range(JOBS)}:
            raise SystemExit("LOST: a job was not done")
        print(f"{len(found)} jobs, {len(found)} results, none lost")


if __name__ == "__main__":
    main()
