"""SQLite of the standard library: WAL, NORMAL (synced: FULL)."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator


class Rival:
    title = f"sqlite3 {sqlite3.sqlite_version} WAL NORMAL (synced: FULL)"

    def __init__(self, path: str, synced: bool) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
        self.database.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, value BLOB NOT NULL)")

    def append(self, value: bytes) -> None:
        self.database.execute("INSERT INTO log (value) VALUES (?)", (value,))

    def append_many(self, values: list[bytes]) -> None:
        self.database.execute("BEGIN")
        self.database.executemany(
            "INSERT INTO log (value) VALUES (?)", [(value,) for value in values]
        )
        self.database.execute("COMMIT")

    def finish(self) -> None:
        pass

    def read_each(self) -> Iterator[object]:
        return iter(self.database.execute("SELECT value FROM log ORDER BY id"))

    def read_batches(self) -> Iterator[int]:
        cursor = self.database.execute("SELECT value FROM log ORDER BY id")
        while rows := cursor.fetchmany(1_000):
            yield len(rows)

    def getter(self) -> Callable[[int], object]:
        execute = self.database.execute
        query = "SELECT value FROM log WHERE id = ?"
        return lambda index: execute(query, (index + 1,)).fetchone()[0]
