"""A transactional outbox: what the database commits is sent, once; what it rolls back never is.

The application writes an order and the event about it in one SQL transaction. A relay sends the
events to a stream through an idempotent producer, with the row's id as sequence. Application and
relay are killed with SIGKILL at random; afterwards there is one event for each order.

Run it: `python examples/transactional_outbox.py`.
"""

import itertools
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import millstream

SCHEMA = """
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT NOT NULL, cents INTEGER NOT NULL);
CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, customer TEXT NOT NULL,
                     event TEXT NOT NULL);
"""
ROUNDS = 6


def connect(path: Path) -> closing[sqlite3.Connection]:
    """Open a database that several processes use."""
    connection = sqlite3.connect(path, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    return closing(connection)


def take_orders(scratch: Path) -> None:
    """The application: an order and its event are one transaction. One in ten is rolled back."""
    dice = random.Random()
    with connect(scratch / "shop.db") as shop:
        for number in itertools.count(1):
            customer, cents = f"customer-{dice.randrange(20)}", dice.randrange(100, 10_000)
            shop.execute("BEGIN")
            done = shop.execute(
                "INSERT INTO orders (customer, cents) VALUES (?, ?)", (customer, cents)
            )
            event = {"type": "order placed", "order": done.lastrowid, "cents": cents}
            shop.execute(
                "INSERT INTO outbox (customer, event) VALUES (?, ?)", (customer, json.dumps(event))
            )
            if dice.random() < 0.1:
                shop.rollback()  # the card was declined
            else:
                shop.commit()
            print(number, flush=True)
            time.sleep(0.0005)


def relay(scratch: Path) -> None:
    """Send what is in the outbox, in order; forget what is safe in the stream."""
    with millstream.open(scratch / "store") as store, connect(scratch / "shop.db") as shop:
        producer = store.stream("orders", partitions=3).producer(id="shop.db/outbox")
        while True:
            rows = shop.execute("SELECT id, customer, event FROM outbox ORDER BY id LIMIT 200")
            found = rows.fetchall()
            if not found:
                time.sleep(0.002)
                continue
            # What was sent before a kill, and not deleted, is sent again: it adds nothing.
            producer.append_many(
                [event.encode() for _, _, event in found],
                keys=[customer.encode() for _, customer, _ in found],
                sequences=[row for row, _, _ in found],
                durability="sync",
            )
            with shop:
                shop.execute("DELETE FROM outbox WHERE id <= ?", (found[-1][0],))
            print(found[-1][0], flush=True)


def start(role: str, scratch: Path) -> subprocess.Popen[bytes]:
    """Run the application or the relay in a process of its own; its lines count what it did."""
    command = [sys.executable, __file__, role, scratch]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL, as a crash does."""
    process.kill()
    process.communicate()


def main() -> None:
    if sys.argv[1:]:
        {"take_orders": take_orders, "relay": relay}[sys.argv[1]](Path(sys.argv[2]))
    dice = random.Random()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with connect(scratch / "shop.db") as shop:
            shop.executescript(SCHEMA)
        for _ in range(ROUNDS):
            processes = [start(role, scratch) for role in ("take_orders", "relay")]
            for process in processes:  # kill both in the middle of their work
                for _ in range(dice.randrange(30, 60) if process is processes[0] else 1):
                    process.stdout.readline()
            for process in dice.sample(processes, 2):
                stop(process)
        with connect(scratch / "shop.db") as shop:
            orders = {row[0] for row in shop.execute("SELECT id FROM orders")}
            last = start("relay", scratch)
            while shop.execute("SELECT count(*) FROM outbox").fetchone() != (0,):
                time.sleep(0.01)
        stop(last)
        with millstream.open(scratch / "store") as store:
            batches = store.stream("orders", partitions=3).read()
            events = [json.loads(bytes(value)) for batch in batches for value in batch.values]
        told = [event["order"] for event in events]
        if sorted(told) != sorted(orders):
            raise SystemExit(f"{len(orders)} orders and {len(told)} events do not match")
        print(f"{2 * ROUNDS} kills; {len(orders):,} orders, {len(told):,} events, one for each")


if __name__ == "__main__":
    main()
