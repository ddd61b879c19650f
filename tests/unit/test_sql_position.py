"""`position_in`: effects and position in one transaction of the user's SQLite database."""

import sqlite3
import subprocess
import sys

import pytest
from timing import until

import millstream
from millstream import Fenced, InvalidArgument, InvalidType
from millstream.testing import clock

WORKER = """
import sqlite3, sys, time, millstream
connection = sqlite3.connect(sys.argv[2], timeout=30)
with millstream.open(sys.argv[1], durability="process") as store:
    consumer = store.stream("s").consumer(
        group="g", delivery="exactly_once", max_records=7, session=0.5)
    positions = consumer.position_in(connection)
    for batch in consumer:
        time.sleep(0.004)  # the work, so that kills come in the middle of it
        try:
            with connection:
                connection.executemany("INSERT INTO seen VALUES (?)", [[v] for v in batch.values])
                positions.commit()
        except millstream.Fenced:
            pass
"""


@pytest.fixture
def stream(store):
    stream = store.stream("s", partitions=2)
    for partition in range(2):
        stream.append_many([b"%d.%d" % (partition, i) for i in range(10)], partition=partition)
    return stream


@pytest.fixture
def database(tmp_path):
    connection = sqlite3.connect(tmp_path / "effects.db", timeout=5)
    connection.execute("CREATE TABLE seen (value BLOB)")
    connection.commit()
    yield connection
    connection.close()


def seen(connection):
    return sorted(value for (value,) in connection.execute("SELECT value FROM seen"))


def handle(connection, positions, batch):
    with connection:
        connection.executemany("INSERT INTO seen VALUES (?)", [[v] for v in batch.values])
        positions.commit()


def every(stream):
    return sorted(value for batch in stream.read() for value in batch.values)


def test_effects_and_position_are_committed_once(stream, database):
    for _ in range(4):
        with stream.consumer(group="g", delivery="exactly_once", max_records=4) as consumer:
            positions = consumer.position_in(database)
            for _ in range(2):
                batch = consumer.poll()
                if batch is not None:
                    handle(database, positions, batch)
    assert seen(database) == every(stream)
    assert stream.group("g").lag() <= 4  # the group's own file follows at the next batch


def test_what_was_rolled_back_is_delivered_again(stream, database):
    with stream.consumer(group="g", delivery="exactly_once", max_records=3) as consumer:
        positions = consumer.position_in(database)
        batch = consumer.poll()
        with pytest.raises(ZeroDivisionError), database:
            database.execute("INSERT INTO seen VALUES (?)", [b"x"])
            positions.commit(batch)
            raise ZeroDivisionError
        again = []
        while (following := consumer.poll()) is not None:
            again += following.values
            handle(database, positions, following)
        assert seen(database) == every(stream) == sorted(again)
        assert consumer.lag() == 0


def test_zombie_is_refused_within_its_own_transaction(tmp_path, database):
    with clock() as now, millstream.temporary(durability="process") as store:
        stream = store.stream("s")
        stream.append_many([b"a", b"b"])
        slow = stream.consumer(group="g", delivery="exactly_once", max_processing=1)
        positions = slow.position_in(database)
        batch = slow.poll()
        now.advance(2)
        other_database = sqlite3.connect(tmp_path / "effects.db", timeout=5)
        with stream.consumer(group="g", delivery="exactly_once") as other:
            theirs = other.position_in(other_database)
            mine = other.poll()
            assert list(mine.values) == [b"a", b"b"]
            with pytest.raises(Fenced), database:
                database.execute("INSERT INTO seen VALUES (?)", [b"twice"])
                positions.commit(batch)
            handle(other_database, theirs, mine)
        other_database.close()
        assert seen(database) == [b"a", b"b"]
        slow.close()


def test_the_database_says_where_to_go_on_whatever_the_group_says(stream, database):
    with stream.consumer(group="g", delivery="exactly_once") as consumer:
        positions = consumer.position_in(database)
        handle(database, positions, consumer.poll())
    stream.group("g").seek("latest")
    with stream.consumer(group="g", delivery="exactly_once") as consumer:
        positions = consumer.position_in(database)
        while (batch := consumer.poll()) is not None:
            handle(database, positions, batch)
    assert len(seen(database)) in (10, 20)  # of a partition new to the database, the group's word
    assert len(set(seen(database))) == len(seen(database))


def test_connections_that_cannot_be_used_are_refused(stream, tmp_path, database):
    with stream.consumer(group="g", delivery="exactly_once") as consumer:
        with pytest.raises(InvalidType):
            consumer.position_in("effects.db")
        database.execute("INSERT INTO seen VALUES (1)")
        with pytest.raises(InvalidArgument, match="within a transaction"):
            consumer.position_in(database)
        database.rollback()
        alone = sqlite3.connect(tmp_path / "alone.db", isolation_level=None)
        positions = consumer.position_in(alone)
        consumer.poll()
        with pytest.raises(InvalidArgument, match="by itself"):
            positions.commit()
        alone.execute("BEGIN")
        positions.commit()
        alone.execute("COMMIT")
        assert consumer.poll() is not None
        assert stream.group("g").lag() == 10
        with pytest.raises(InvalidType):
            positions.commit(3)
        alone.close()


def test_consumers_killed_at_random_leave_each_effect_once(tmp_path, database):
    path = tmp_path / "store"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", partitions=3)
        stream.append_many([b"%d" % i for i in range(1500)], keys=[b"%d" % i for i in range(1500)])
        command = [sys.executable, "-c", WORKER, str(path), str(tmp_path / "effects.db")]
        running, kills = [], 0
        while len(seen(database)) < 1500:
            while len(running) < 2:
                running.append(subprocess.Popen(command, stderr=subprocess.PIPE))
            goal = min(len(seen(database)) + 150, 1500)
            until(lambda goal=goal: len(seen(database)) >= goal)
            victim = running.pop(0)
            victim.kill()
            victim.wait()
            assert victim.stderr.read() == b""
            victim.stderr.close()
            kills += 1
        for process in running:
            process.kill()
            process.wait()
            process.stderr.close()
    assert seen(database) == sorted(b"%d" % i for i in range(1500))
    print(f"records=1500 kills={kills} lost=0 dup=0")
