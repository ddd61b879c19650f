"""At most once, at least once, once: kill the consumer at random, and count its effects.

The effect of a record is a line in a file, or a row in a SQLite database. Two consumers of a group
share the records; again and again one of them is killed with SIGKILL. At the end:

    at_most_once    no effect twice; a kill may take the effects of the batch in hand
    at_least_once   no effect missing; a kill may bring those of the batch in hand twice
    exactly once    each effect once: effects and position are in one transaction of the database

Run it: `python examples/delivery.py [KILLS]`.
"""

import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter

import millstream

RECORDS = 2000
BATCH = 20


def consume(guarantee: str, store_path: str, effects: str) -> None:
    """Handle the records of a group until none came for a second."""
    delivery = "exactly_once" if guarantee == "once" else guarantee
    with millstream.open(store_path, durability="process") as store:
        consumer = store.stream("orders").consumer(
            group=guarantee, delivery=delivery, max_records=BATCH, timeout=1.0
        )
        with consumer:
            if guarantee == "once":
                consume_into_database(consumer, effects)
                return
            with open(effects, "ab", buffering=0) as out:
                for batch in consumer:  # at_most_once: committed already
                    for value in batch.values:
                        out.write(value + b"\n")
                        time.sleep(0.0001)
                    if delivery == "at_least_once":
                        consumer.commit()


def consume_into_database(consumer: millstream.Consumer, effects: str) -> None:
    """Have effects and position in one transaction of the user's own database."""
    database = sqlite3.connect(effects, timeout=60)
    positions = consumer.position_in(database)
    for batch in consumer:
        try:
            with database:
                for value in batch.values:
                    database.execute("INSERT INTO effects VALUES (?)", [value])
                    time.sleep(0.0001)
                positions.commit()
        except millstream.Fenced:
            pass  # rolled back: another consumer has the partition, and handles them
    database.close()


def count(guarantee: str, effects: str) -> Counter[bytes]:
    """How often each record had its effect."""
    if guarantee != "once":
        with open(effects, "rb") as lines:
            return Counter(line.rstrip(b"\n") for line in lines if line.endswith(b"\n"))
    database = sqlite3.connect(effects)
    found = Counter(value for (value,) in database.execute("SELECT value FROM effects"))
    database.close()
    return found


def run(guarantee: str, store_path: str, effects: str, kills: int) -> None:
    """Run two consumers, kill one after the other, and let two finish."""
    if guarantee == "once":
        database = sqlite3.connect(effects)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE effects (value BLOB)")
        database.commit()
        database.close()
    command = [sys.executable, __file__, "--consume", guarantee, store_path, effects]
    running = [subprocess.Popen(command) for _ in range(2)]
    for _ in range(kills):
        time.sleep(random.uniform(0.15, 0.3))
        victim = running.pop(0)
        victim.kill()
        victim.wait()
        running.append(subprocess.Popen(command))
    for process in running:
        process.wait()


def main() -> None:
    if sys.argv[1:2] == ["--consume"]:
        consume(*sys.argv[2:])
        return
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    with tempfile.TemporaryDirectory() as scratch:
        store_path = os.path.join(scratch, "store")
        orders = [b"order %d" % number for number in range(RECORDS)]
        with millstream.open(store_path, durability="process") as store:
            stream = store.stream("orders", partitions=4)
            stream.append_many(orders, keys=orders)
            for guarantee in ("at_most_once", "at_least_once", "once"):
                effects = os.path.join(scratch, guarantee)
                run(guarantee, store_path, effects, kills)
                found = count(guarantee, effects)
                missing = sum(1 for order in orders if order not in found)
                twice = sum(1 for times in found.values() if times > 1)
                print(
                    f"{guarantee}: {RECORDS:,} records, {kills} kills: {missing} missing,"
                    f" {twice} more than once, lag {stream.group(guarantee).lag()}"
                )


if __name__ == "__main__":
    main()
