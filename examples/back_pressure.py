"""Back-pressure: a full queue makes its producers wait, or turn work away; room wakes them, and so
does a higher bound.

Run it: `python examples/back_pressure.py`.
"""

import threading
import time

import millstream

JOBS = 200


def produce(jobs: millstream.Queue) -> None:
    """Put jobs as fast as there is room."""
    for number in range(JOBS):
        jobs.put(b"%d" % number)  # waits while the queue is full


def main() -> None:
    with millstream.temporary() as store:
        jobs = store.queue("jobs", capacity=10)
        producer = threading.Thread(target=produce, args=(jobs,))
        start = time.perf_counter()
        producer.start()
        deepest = 0
        for _ in range(JOBS):
            with jobs.get(timeout=10):
                deepest = max(deepest, len(jobs))
                time.sleep(0.001)  # the consumer sets the pace
        producer.join()
        print(f"{JOBS} jobs in {time.perf_counter() - start:.2f} s, never more than {deepest}")

        shed = jobs.put_many([b"%d" % number for number in range(25)], timeout=0)
        print(f"of 25 offered at once, {len(shed)} fitted")
        try:
            jobs.put(b"one more", timeout=0.05)
        except millstream.QueueFull:
            print("full: the caller decides what that means")
        with jobs.get(timeout=1):
            pass
        jobs.put(b"one more", timeout=0)
        print("room again: one was done")
        jobs.alter(capacity=20)
        print(f"a higher bound: {len(jobs.put_many([b'more'] * 25))} more fitted")


if __name__ == "__main__":
    main()
