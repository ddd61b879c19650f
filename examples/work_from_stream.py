"""A work queue fed by a stream: keep the events for ever, hand out the work once.

Orders are events: they stay in a stream, for whoever wants to read them now or later. Packing them
is work: it goes through a queue, where each message has one worker, a lease, retries and a
priority. A pipe makes one out of the other, in transactions: each order becomes one message, though
the pipe here is stopped half-way and begun anew.

Run it: `python examples/work_from_stream.py`.
"""

import json
import threading
from collections import Counter

import millstream

ORDERS = 200


def main() -> None:
    """Take orders, make work of them, do it, and tell the stream what was done."""
    with millstream.temporary() as store:
        orders, packed = store.stream("orders"), store.stream("packed")
        parcels = store.queue("parcels", retry=millstream.RetryPolicy(backoff=0.01))
        orders.append_many(
            [json.dumps({"order": n, "express": n % 10 == 0}).encode() for n in range(ORDERS)]
        )

        def work_of(record):
            order = json.loads(record.value)
            return millstream.Put(record.value, priority=0 if order["express"] else 2)

        for half in (1, 2):
            with store.pipe(orders, work_of, parcels, group="packing", batch=25) as pipe:
                while pipe.count < ORDERS / 2 and pipe.step():
                    pass
                print(f"half {half}: {pipe.count} orders became work")

        failed = Counter()
        lock = threading.Lock()

        @parcels.worker(concurrency=4)
        def pack(message):
            order = json.loads(message.value)
            if order["order"] % 50 == 7 and message.attempt == 1:
                with lock:
                    failed["no tape left"] += 1
                raise millstream.Retry(0.01)
            # What was done, and that it was, in one: a worker that dies here does it again, once.
            with store.transaction() as tx:
                tx.append(packed, b"%d" % order["order"])
                tx.ack(message)

        millstream.run(parcels, until_empty=True)
        done = [int(value) for batch in packed.read(partition=0) for value in batch.values]
        express = [n for n in done[: ORDERS // 4] if n % 10 == 0]
        print(f"{len(done)} packed, each once: {len(set(done)) == len(done) == ORDERS}")
        print(f"{len(express)} of 20 express orders among the first {ORDERS // 4}")
        print(f"{failed['no tape left']} tried again; {orders.next_offset(0)} orders are kept")


if __name__ == "__main__":
    main()
