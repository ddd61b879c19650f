"""Two processes, one stream: one appends orders, the other waits for them.

Run it: `python examples/producer_consumer.py [DIRECTORY]`.
"""

import multiprocessing
import sys
import tempfile
import time

import millstream

ORDERS = 5_000
END = b"end"


def produce(orders: millstream.Stream) -> None:
    """Append orders one at a time; those of one customer keep their order."""
    start = time.perf_counter()
    for number in range(ORDERS):
        customer = b"customer-%d" % (number % 100)
        orders.append(b"order %d" % number, key=customer)
    seconds = time.perf_counter() - start
    for partition in range(orders.partitions):
        orders.append(END, partition=partition)
    print(f"producer: {ORDERS:,} orders in {seconds:.3f} s, one call each", flush=True)


def consume(orders: millstream.Stream) -> tuple[int, int]:
    """Read until every partition has said that it ended; count the orders and the batches."""
    orders_seen = batches = ended = 0
    for batch in orders.read(follow=True, timeout=30):
        batches += 1
        for value in batch.values:
            if value == END:
                ended += 1
            else:
                orders_seen += 1
        if ended == orders.partitions:
            break
    return orders_seen, batches


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = sys.argv[1] if len(sys.argv) > 1 else scratch
        with millstream.open(path) as store:
            orders = store.stream("orders", partitions=4)
            # A handle pickles as path and name; the child opens the store for itself.
            context = multiprocessing.get_context("spawn")
            producer = context.Process(target=produce, args=(orders,))
            producer.start()
            seen, batches = consume(orders)
            producer.join()
            print(f"consumer: {seen:,} orders in {batches:,} batches")
            for part in orders.stats().partitions:
                print(f"  partition {part.partition}: {part.records:,} records")


if __name__ == "__main__":
    main()
