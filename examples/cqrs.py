"""Orders in, a view out: the write side appends, the read side looks up.

The writer appends each change of an order under the order's number; null takes an order away. The
reader has a view, the latest state of each order, and never asks the log. `wait_for` gives it its
own writes. Compaction keeps of each order the last change, so that the log stays as large as what
it says, and a snapshot lets the next view read only what is new.

Run it: `python examples/cqrs.py`.
"""

import json
import tempfile

import millstream

ORDERS, CHANGES = 500, 20_000


def change(orders: millstream.Stream, number: int, **fields: object) -> millstream.Position:
    """Append what an order is from now on."""
    return orders.append(json.dumps(fields).encode(), key=b"order-%04d" % number)


def main() -> None:
    keep = millstream.Compaction(min_dirty=0.3, tombstone_age="24h")
    with tempfile.TemporaryDirectory() as directory:
        with millstream.open(directory) as store:
            orders = store.stream("orders", segment_bytes="256KiB", compact=keep)
            for i in range(CHANGES):
                state = ("placed", "paid", "packed", "sent")[i // ORDERS % 4]
                change(orders, i % ORDERS, state=state, total=i % 97)
            with orders.view() as view:
                print(f"{CHANGES:,} changes of {len(view)} orders")
                position = change(orders, 7, state="returned", total=7)
                view.wait_for(position)
                print(f"order 7 after its change: {json.loads(view[b'order-0007'])['state']}")
                view.wait_for(orders.append(None, key=b"order-0008"))
                print(f"order 8 is there: {b'order-0008' in view}")
                late = [key for key, value in view.items() if b'"returned"' in value]
                print(f"returned: {late[0].decode()}")
            before = orders.stats().records
            result = orders.compact()
            after = orders.stats().records
            print(f"compacted: {before:,} records to {after:,}, {result.replaced} segments smaller")
        with millstream.open(directory) as store:
            orders = store.stream("orders")
            change(orders, 9, state="lost", total=9)
            with orders.view() as view:  # from the snapshot, and one record more
                print(
                    f"opened again: {len(view)} orders, order 9 {json.loads(view[b'order-0009'])}"
                )


if __name__ == "__main__":
    main()
