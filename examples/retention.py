"""Keep the newest records of a stream, and what a reader that fell behind is told.

Whole segments go, oldest first. Retention does not wait for readers: one that is behind the start
gets `OffsetOutOfRange` with the valid range, or goes on at the earliest record if it asked to.

Run it: `python examples/retention.py`.
"""

import millstream

RECORDS, KEPT = 40_000, 10_000


def main() -> None:
    with millstream.temporary() as store:
        keep = millstream.Retention(records=KEPT)
        logs = store.stream("logs", segment_bytes="256KiB", retention=keep)
        slow = logs.read()
        logs.append_many([b"line 0"])
        first = next(slow)
        for start in range(1, RECORDS, 1_000):
            count = min(1_000, RECORDS - start)
            logs.append_many([b"line %d, and some more text" % (start + i) for i in range(count)])
        logs.enforce_retention()
        stats = logs.stats().partitions[0]
        print(f"appended {RECORDS:,}, of which {KEPT:,} must stay")
        print(f"kept {stats.records:,}: {stats.segments} whole segments")
        print(f"offsets {stats.first_offset:,} to {stats.next_offset - 1:,}")
        print(f"a batch read before is still valid: {first.values[0].decode()!r}")
        try:
            next(logs.read(start=0))
        except millstream.OffsetOutOfRange as error:
            print(f"offset 0 is gone; there are {error.first:,} to {error.next - 1:,}")
        batch = next(logs.read(start=0, on_lost="earliest"))
        print(f"with on_lost='earliest' reading begins at {batch.first_offset:,}")
        middle = (stats.first_offset + stats.next_offset) // 2
        left = logs.delete_before(millstream.Position(0, batch.epoch, middle))
        print(f"delete_before({middle:,}) left offsets from {left:,} on")


if __name__ == "__main__":
    main()
