"""Rebuild state from a log: an account book whose only file is the stream of what happened.

A null value with a key (a tombstone) closes an account. A snapshot remembers the next offset of
each partition, so that a later start replays only what came after it.

Run it: `python examples/replay.py`.
"""

import json
import random
import tempfile
from pathlib import Path

import millstream

EVENTS = 20_000


class Book:
    """Balances by account, and up to where the log is in them."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.balances: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        if snapshot.exists():
            self.balances, self.offsets = json.loads(snapshot.read_text())

    def replay(self, log: millstream.Stream) -> int:
        """Apply what is new in the log; return how many records that was."""
        applied = 0
        for partition in range(log.partitions):
            start = self.offsets.get(str(partition), 0)
            for batch in log.read(partition=partition, start=start):
                for key, value in zip(batch.keys, batch.values, strict=True):
                    account = key.decode()
                    if value is None:
                        self.balances.pop(account, None)
                    else:
                        self.balances[account] = self.balances.get(account, 0) + int(value)
                applied += len(batch)
                self.offsets[str(partition)] = batch.next_offset
        return applied

    def save(self) -> None:
        """Keep balances and offsets together: both are of one moment."""
        aside = self.snapshot.with_suffix(".tmp")
        aside.write_text(json.dumps([self.balances, self.offsets]))
        aside.replace(self.snapshot)


def happen(log: millstream.Stream, count: int, chance: random.Random) -> None:
    """Append transfers, and now and then the end of an account."""
    accounts = [b"account-%d" % chance.randrange(500) for _ in range(count)]
    changes = [
        None if chance.random() < 0.001 else b"%d" % chance.randint(-100, 100) for _ in accounts
    ]
    for first in range(0, count, 1_000):
        log.append_many(changes[first : first + 1_000], keys=accounts[first : first + 1_000])


def main() -> None:
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as scratch:
        snapshot = Path(scratch, "book.json")
        with millstream.open(Path(scratch, "store")) as store:
            log = store.stream("transfers", partitions=4)
            happen(log, EVENTS, chance)
            book = Book(snapshot)
            print(f"first start: {book.replay(log):,} records replayed")
            book.save()
            happen(log, 1_000, chance)
        with millstream.open(Path(scratch, "store")) as store:
            log = store.stream("transfers")
            later = Book(snapshot)
            print(f"second start, from the snapshot: {later.replay(log):,} records replayed")
            whole = Book(Path(scratch, "none"))
            print(f"from nothing: {whole.replay(log):,} records replayed")
            same = "equal" if whole.balances == later.balances else "NOT equal"
            print(f"{len(whole.balances)} accounts, the two books are {same}")


if __name__ == "__main__":
    main()
