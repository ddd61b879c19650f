"""Event sourcing: accounts whose balances are nowhere stored, only what happened to them.

The stream of events is the truth. A teller replays it, decides on numbered orders by the state that
this gives, and appends what happened. It is killed with SIGKILL again and again: the number of the
order is the sequence of an idempotent producer, so that no order is done twice, and the events of a
transfer are one batch, so that none is done by half. A snapshot, with the offset behind its last
event, makes the next start short; it may be lost at any time.

Run it: `python examples/event_sourcing.py`.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import millstream

ACCOUNTS = 10
ORDERS = 4_000
SNAPSHOT_EVERY = 500
KILLS = 8  # about


@dataclass
class Ledger:
    """The state: what the events up to an offset come to."""

    next_offset: int = 0
    balances: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    replayed: int = 0

    def apply(self, event: dict[str, Any]) -> None:
        """One event. There is no other way to change the state."""
        if event["type"] == "refused":
            self.refused += 1
        else:
            sign = -1 if event["type"] == "withdrawn" else 1
            self.balances[event["account"]] += sign * event["cents"]

    def catch_up(self, stream: millstream.Stream, end: int | None = None) -> None:
        """Replay what came since, or all before an offset."""
        most = None if end is None else end - self.next_offset
        for batch in stream.read(partition=0, start=self.next_offset, max_records=most):
            for value in batch.values:
                self.apply(json.loads(value))
            self.replayed += len(batch)
            self.next_offset = batch.next_offset

    def save(self, path: Path) -> None:
        """Keep a snapshot: the old one or the new one, never half of it."""
        state = {"next_offset": self.next_offset, "refused": self.refused, **self.as_json()}
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(state))
        os.replace(draft, path)

    def as_json(self) -> dict[str, Any]:
        """The balances, in a form that compares."""
        return {"balances": dict(sorted(self.balances.items()))}

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Begin at the snapshot, or at nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            state = json.loads(path.read_text())
            return cls(state["next_offset"], Counter(state["balances"]), state["refused"])
        return cls()


def order(number: int) -> tuple[str, str, int]:
    """What customers ask for: (from, to, cents), the same whenever it is asked."""
    dice = random.Random(number)
    if number < ACCOUNTS:
        return "cash", f"account-{number}", 10_000
    source, target = dice.sample(range(ACCOUNTS), 2)
    return f"account-{source}", f"account-{target}", dice.randrange(1, 5_000)


def decide(ledger: Ledger, source: str, target: str, cents: int) -> list[dict[str, Any]]:
    """The business rule: no account but the cash desk goes below nothing."""
    if source != "cash" and ledger.balances[source] < cents:
        return [{"type": "refused", "account": source, "cents": cents}]
    return [
        {"type": "withdrawn", "account": source, "cents": cents},
        {"type": "deposited", "account": target, "cents": cents},
    ]


def work(scratch: Path) -> None:
    """The teller: from the last order whose events are there to the last one."""
    ledger = Ledger.load(scratch / "snapshot.json")
    with millstream.open(scratch / "store") as store:
        stream = store.stream("ledger", create=True)
        teller = stream.producer(id="teller")
        # Events of order n have the sequences 2 n and 2 n + 1.
        for number in range(teller.last_sequence // 2 + 1, ORDERS):
            ledger.catch_up(stream)
            events = decide(ledger, *order(number))
            teller.append_many(
                [json.dumps(event).encode() for event in events],
                sequences=[2 * number, 2 * number + 1][-len(events) :],
            )
            if number % SNAPSHOT_EVERY == 0:
                ledger.save(scratch / "snapshot.json")
            print(number, flush=True)  # it has got on: now it may be killed
            time.sleep(0.0002)


def run_teller(scratch: Path, orders: int) -> bool:
    """Kill a teller after so many orders, unless it was done before; was it killed?"""
    command = [sys.executable, __file__, scratch]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as teller:
        assert teller.stdout is not None
        for done, _ in enumerate(teller.stdout, 1):
            if done == orders:
                teller.kill()
                break
    if teller.returncode not in (0, -signal.SIGKILL):
        raise SystemExit("the teller failed")
    return teller.returncode != 0


def main() -> None:
    if sys.argv[1:]:
        work(Path(sys.argv[1]))
        return
    dice = random.Random()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        kills = 0
        while run_teller(scratch, orders=dice.randrange(1, 2 * ORDERS // KILLS)):
            kills += 1
        with millstream.open(scratch / "store") as store:
            stream = store.stream("ledger")
            fast = Ledger.load(scratch / "snapshot.json")
            fast.catch_up(stream)
            full = Ledger()
            full.catch_up(stream)
            if fast.as_json() != full.as_json() or fast.refused != full.refused:
                raise SystemExit("the snapshot and what came since are not the whole")
            half = Ledger()
            half.catch_up(stream, end=2 * ACCOUNTS)
        done = (full.next_offset - full.refused) // 2
        print(f"{kills} kills; {done:,} transfers and {full.refused:,} refusals, {ORDERS:,} orders")
        print(f"from nothing: {full.replayed:,} events replayed")
        print(f"from the snapshot: {fast.replayed:,} events replayed, the same balances")
        print(f"all balances: {sum(full.balances.values())} cents; lowest of an account:"
              f" {min(v for k, v in full.balances.items() if k != 'cash')}")  # fmt: skip
        print(f"as of event {half.next_offset}: account-3 had {half.balances['account-3']:,} cents")
        if done + full.refused != ORDERS or sum(full.balances.values()) != 0:
            raise SystemExit("an order was lost, or done twice, or by half")


if __name__ == "__main__":
    main()
