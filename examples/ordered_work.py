"""Ordered work: one job of a customer at a time, in order, and customers beside each other.

A job that fails is tried again before the customer's next one; others do not wait for it.

Run it: `python examples/ordered_work.py`.
"""

import logging
import threading
import time

import millstream

CUSTOMERS, JOBS = 20, 10


def main() -> None:
    logging.getLogger("millstream").setLevel(logging.ERROR)  # one job fails on purpose
    with millstream.temporary() as store:
        policy = millstream.RetryPolicy(backoff=0.2)
        orders = store.queue("orders", ordering="key", retry=policy)
        for number in range(JOBS):
            for customer in range(CUSTOMERS):
                orders.put(b"%d" % number, key=b"customer-%d" % customer)

        lock = threading.Lock()
        seen: dict[bytes, list[int]] = {}
        most = busy = 0

        @orders.worker(concurrency=8)
        def handle(message: millstream.Message) -> None:
            nonlocal most, busy
            with lock:
                busy += 1
                most = max(most, busy)
            time.sleep(0.001)
            with lock:
                busy -= 1
            if message.key == b"customer-7" and message.value == b"3" and message.attempt == 1:
                raise ConnectionError("try again")
            with lock:
                seen.setdefault(message.key, []).append(int(message.value))

        counts = millstream.run(orders, until_empty=True)
        print(counts)
        print(f"up to {most} at a time")
        for customer, numbers in seen.items():
            if numbers != list(range(JOBS)):
                raise SystemExit(f"OUT OF ORDER: {customer!r} {numbers}")
        print(f"{len(seen)} customers, each in order")


if __name__ == "__main__":
    main()
