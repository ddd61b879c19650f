"""Change data capture: a SQLite database into a stream, and from there into a second database.

Triggers write each change of a row into a table `changes`, in the transaction that made it. A pump
sends that table to the stream, through an idempotent producer with the change's id as sequence. An
applier keeps a copy: rows, and how far it has read, in one SQL transaction. Both are killed with
SIGKILL again and again, while the application goes on writing; the copy ends equal all the same.

Run it: `python examples/change_data_capture.py`.
"""

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

SOURCE = """
CREATE TABLE accounts (id INTEGER PRIMARY KEY, owner TEXT NOT NULL, cents INTEGER NOT NULL);
CREATE TABLE changes (id INTEGER PRIMARY KEY AUTOINCREMENT, account INTEGER NOT NULL, state TEXT);
CREATE TRIGGER inserted AFTER INSERT ON accounts BEGIN
  INSERT INTO changes (account, state)
  VALUES (new.id, json_object('owner', new.owner, 'cents', new.cents));
END;
CREATE TRIGGER updated AFTER UPDATE ON accounts BEGIN
  INSERT INTO changes (account, state)
  VALUES (new.id, json_object('owner', new.owner, 'cents', new.cents));
END;
CREATE TRIGGER deleted AFTER DELETE ON accounts BEGIN
  INSERT INTO changes (account, state) VALUES (old.id, NULL);
END;
"""
COPY = """
CREATE TABLE IF NOT EXISTS accounts (id INTEGER PRIMARY KEY, owner TEXT, cents INTEGER);
CREATE TABLE IF NOT EXISTS positions (partition INTEGER PRIMARY KEY, next INTEGER NOT NULL);
"""
STEPS = 1_500
KILLS = 8


def connect(path: Path) -> closing[sqlite3.Connection]:
    """Open a database that several processes use."""
    connection = sqlite3.connect(path, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    return closing(connection)


def pump(scratch: Path) -> None:
    """Send changes in their order, and remove those that are safe in the stream."""
    with millstream.open(scratch / "store") as store, connect(scratch / "source.db") as source:
        stream = store.stream("accounts", partitions=2)
        producer = stream.producer(id="source.db/accounts")
        sent = producer.last_sequence
        while True:
            rows = source.execute(
                "SELECT id, account, state FROM changes WHERE id > ? ORDER BY id LIMIT 100", (sent,)
            ).fetchall()
            if not rows:
                time.sleep(0.005)
                continue
            ids = [row[0] for row in rows]
            producer.append_many(
                [None if state is None else state.encode() for _, _, state in rows],
                keys=[b"%d" % account for _, account, _ in rows],  # an account's changes in order
                headers=[{"change": b"%d" % change} for change in ids],
                sequences=ids,
                durability="sync",  # what is deleted below exists nowhere else
            )
            sent = ids[-1]
            with source:
                source.execute("DELETE FROM changes WHERE id <= ?", (sent,))


def apply(scratch: Path) -> None:
    """Keep the copy: the rows of a batch and the position behind it are one transaction."""
    with millstream.open(scratch / "store") as store, connect(scratch / "copy.db") as copy:
        copy.executescript(COPY)
        stream = store.stream("accounts", partitions=2)
        while True:
            for partition in range(stream.partitions):
                found = copy.execute("SELECT next FROM positions WHERE partition = ?", (partition,))
                (start,) = found.fetchone() or (0,)
                for batch in stream.read(partition=partition, start=start, max_records=100):
                    with copy:
                        for key, value in zip(batch.keys, batch.values, strict=True):
                            apply_change(copy, int(key), value)
                        copy.execute(
                            "INSERT OR REPLACE INTO positions VALUES (?, ?)",
                            (partition, batch.next_offset),
                        )
            time.sleep(0.005)


def apply_change(copy: sqlite3.Connection, account: int, value: bytes | None) -> None:
    """One change: the new state of an account, or that it is gone."""
    if value is None:
        copy.execute("DELETE FROM accounts WHERE id = ?", (account,))
        return
    state = json.loads(value)
    row = (account, state["owner"], state["cents"])
    copy.execute("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?)", row)


def work(source: sqlite3.Connection, dice: random.Random) -> None:
    """What the application does; it knows nothing of the stream."""
    account = dice.randrange(50)
    with source:
        row = source.execute("SELECT cents FROM accounts WHERE id = ?", (account,)).fetchone()
        if row is None:
            source.execute("INSERT INTO accounts VALUES (?, ?, 0)", (account, f"owner {account}"))
        elif dice.random() < 0.1:
            source.execute("DELETE FROM accounts WHERE id = ?", (account,))
        else:
            source.execute("UPDATE accounts SET cents = cents + 100 WHERE id = ?", (account,))


def start(role: str, scratch: Path) -> subprocess.Popen[bytes]:
    """Run the pump or the applier in a process of its own."""
    return subprocess.Popen([sys.executable, __file__, role, scratch])


def accounts(path: Path) -> list[tuple[int, str, int]]:
    """The whole table."""
    with connect(path) as connection:
        return connection.execute("SELECT id, owner, cents FROM accounts ORDER BY id").fetchall()


def captured(scratch: Path) -> list[int]:
    """The ids of the changes in the stream."""
    with millstream.open(scratch / "store") as store:
        stream = store.stream("accounts", partitions=2)
        return [int(h["change"]) for batch in stream.read() for h in batch.headers]


def main() -> None:
    if sys.argv[1:]:
        {"pump": pump, "apply": apply}[sys.argv[1]](Path(sys.argv[2]))
    dice = random.Random(7)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with connect(scratch / "source.db") as source:
            source.executescript(SOURCE)
            roles = {role: start(role, scratch) for role in ("pump", "apply")}
            kills = 0
            for step in range(STEPS):
                work(source, dice)
                time.sleep(0.001)
                if step % (STEPS // KILLS) == STEPS // KILLS - 1:
                    role = dice.choice(list(roles))
                    roles[role].kill()
                    roles[role].wait()
                    roles[role] = start(role, scratch)
                    kills += 1
            (made,) = source.execute("SELECT seq FROM sqlite_sequence").fetchone()
        wanted = accounts(scratch / "source.db")
        end = time.monotonic() + 60
        while not (scratch / "copy.db").exists() or accounts(scratch / "copy.db") != wanted:
            if time.monotonic() > end:
                raise SystemExit("the copy never became equal")
            time.sleep(0.05)
        for process in roles.values():
            process.kill()
            process.wait()
        found = captured(scratch)
        if sorted(found) != list(range(1, made + 1)):
            raise SystemExit("a change is missing in the stream, or there twice")
        print(f"{kills} kills of pump and applier")
        print(f"{made:,} changes in the stream, each once")
        print(f"{len(wanted)} accounts, the copy is equal")


if __name__ == "__main__":
    main()
