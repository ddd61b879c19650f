"""Stores of format 1 that an earlier version wrote: this one opens, reads and verifies them.

tests/golden/make.py made them, and says what each is.
"""

import json
import tarfile
from pathlib import Path

import pytest
from golden.make import brief

import millstream
from millstream import inspect

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GOOD = sorted(path.stem for path in GOLDEN.glob("*.json"))
DAMAGED = sorted({path.name.split(".")[0] for path in GOLDEN.glob("*.tar.xz")} - {*GOOD})
CLEAN = {"streams", "compacted", "producers", "queues", "groups", "transactions"}


def unpack(name, directory):
    """A golden store as it was when it was made."""
    path = directory / name
    path.mkdir(mode=0o700)
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as tar:
        for member in tar:
            target = path / member.name
            assert ".." not in target.parts
            if member.isdir():
                target.mkdir(mode=0o700)
            else:
                target.touch(mode=0o600)
                target.write_bytes(tar.extractfile(member).read())
    return path


@pytest.fixture
def golden(tmp_path):
    return lambda name: unpack(name, tmp_path)


def briefs(headers):
    return {name: brief(value) for name, value in dict(headers).items()}


def records(stream):
    rows = [
        [batch.partition, batch.epoch, offset, time, brief(key), brief(value), briefs(headers)]
        for batch in stream.read()
        for offset, time, key, value, headers in zip(
            batch.offsets.tolist(), batch.timestamps.tolist(), batch.keys, batch.values,
            batch.headers, strict=True,
        )
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row[0], row[2]))


def messages(queue):
    return sorted(
        [m.id, m.state, m.priority, brief(m.key), briefs(m.headers), brief(m.value), m.attempts]
        for m in queue.peek(1000)
    )


def letters(queue):
    return sorted(
        [one.id, one.reason, one.first_error, one.last_error, one.attempts, brief(one.value)]
        for one in queue.dead.list()
    )


def compare(store, told):
    """All that was written is there, and nothing else."""
    assert store.streams() == sorted(told["streams"])
    for name, rows in told["streams"].items():
        assert records(store.stream(name)) == rows
    for name, groups in told["groups"].items():
        stream = store.stream(name)
        assert stream.groups() == sorted(groups)
        for group, positions in groups.items():
            found = stream.group(group).positions()
            assert [p and [p.epoch, p.offset] for p in found.values()] == positions
    assert store.queues() == sorted(told["queues"])
    for name, queue in told["queues"].items():
        found = store.queue(name)
        assert messages(found) == queue["messages"]
        assert letters(found) == queue["dead"]
        assert found.paused is queue["paused"]
    for name, items in told["views"].items():
        with store.stream(name).view() as view:
            assert {brief(key): brief(value) for key, value in view.items()} == items


def told_of(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def tree_of(path):
    return {str(one): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_the_golden_stores_are_all_there():
    assert len(GOOD) == 9
    assert len(DAMAGED) == 18
    assert sum(path.stat().st_size for path in GOLDEN.iterdir() if path.is_file()) < 400_000


@pytest.mark.parametrize("name", GOOD)
def test_open_to_write_reads_all_that_was_written(golden, name):
    path = golden(name)
    for _ in range(2):  # the second time as this version left it
        with millstream.open(path) as store:
            compare(store, told_of(name))
            for one in store.queues():
                store.queue(one)._check()
    assert inspect.verify(path).problems == []


@pytest.mark.parametrize("name", sorted(CLEAN))
def test_open_to_read_reads_the_same_and_changes_no_byte(golden, name):
    path = golden(name)
    before = tree_of(path)
    with millstream.open(path, mode="r") as store:
        compare(store, told_of(name))
    assert tree_of(path) == before


@pytest.mark.parametrize("name", GOOD)
def test_the_second_reader_finds_no_fault_and_the_same_records(golden, name):
    path, told = golden(name), told_of(name)
    before = tree_of(path)
    report = inspect.verify(path)
    assert report.problems == []
    if name in CLEAN:
        assert {note.kind for note in report.notes} <= {"spare"}
    rows = {}
    for r in inspect.records(path):
        if r.stream != "@journal":
            rows.setdefault(r.stream, []).append(
                [r.partition, r.epoch, r.offset, r.timestamp, brief(r.key), brief(r.value),
                 briefs(r.headers)])  # fmt: skip
    if name != "recorded":  # whose last transaction is in the journal alone
        assert rows == {stream: rows for stream, rows in told["streams"].items() if rows}
    if name in CLEAN:
        for queue, what in told["queues"].items():
            found = [m for m in inspect.messages(path, queue) if m.state != "dead"]
            assert sorted((m.id, brief(m.payload)) for m in found) == [
                (row[0], row[5]) for row in what["messages"]
            ]
    assert tree_of(path) == before


@pytest.mark.parametrize("name", GOOD)
def test_work_goes_on_in_every_part(golden, name):
    path, told = golden(name), told_of(name)
    with millstream.open(path) as store:
        for one, rows in told["streams"].items():
            stream = store.stream(one)
            at = stream.append(b"new", key=b"new")
            assert at.offset >= max((r[2] + 1 for r in rows if r[0] == at.partition), default=0)
            assert len(records(stream)) == len(rows) + 1
        for one, queue in told["queues"].items():
            found = store.queue(one)
            found.resume()
            ready = {row[0] for row in queue["messages"] if row[1] != "delayed"}
            seen = set()
            while got := found.get_many(1000, timeout=0):
                for m in got:
                    seen.add(m.id)
                    m.ack()
            assert seen == ready
            assert found.dead.redrive() == len(queue["dead"])
            new = found.put(b"new")
            assert new > max([row[0] for row in (*queue["messages"], *queue["dead"])], default=0)
            found._check()
        for one, groups in told["groups"].items():
            stream = store.stream(one)
            for group in groups:
                lag = stream.group(group).lag()
                read = 0
                with stream.consumer(group=group, auto_commit=True, timeout=0) as consumer:
                    for batch in consumer:
                        read += len(batch)
                assert read == lag > 0
                assert stream.group(group).lag() == 0
    assert inspect.verify(path).problems == []


def test_producers_are_known_again(golden):
    path, told = golden("producers"), told_of("producers")
    for _ in range(2):
        with millstream.open(path) as store:
            orders = store.stream("orders")
            before = orders.next_offset(0), orders.next_offset(1)
            for id, last in told["producers"]["orders"].items():
                producer = orders.producer(id)
                assert list(producer.last_sequences) == last
                for partition, sequence in enumerate(last):
                    if sequence >= 0:
                        again = producer.append(b"x", sequence=sequence, partition=partition)
                        assert again is None
            assert (orders.next_offset(0), orders.next_offset(1)) == before


def test_a_deduplication_id_is_known_again(golden):
    with millstream.open(golden("queues")) as store:
        q = store.queue("once")
        [m] = q.peek(5)
        assert q.put(b"again", dedup_id="the id") == m.id
        q.put(b"again", dedup_id="another")  # which was acknowledged: its id is known as well
        assert len(q) == 1


def test_order_by_key_is_kept(golden):
    with millstream.open(golden("queues")) as store:
        q, seen = store.queue("ordered"), []
        while got := q.get_many(10, timeout=0):
            assert len({m.key for m in got}) == len(got)
            for m in got:
                seen.append((bytes(m.key), bytes(m.value)))
                m.ack()
        assert [v for k, v in seen if k == b"k0"] == [b"0", b"2", b"4"]
        assert [v for k, v in seen if k == b"k1"] == [b"1", b"3", b"5"]


def test_transactions_can_be_gone_on_with(golden):
    for name in ("transactions", "recorded", "undecided"):
        with millstream.open(golden(name)) as store:
            orders, paid, jobs = store.stream("orders"), store.stream("paid"), store.queue("jobs")
            (begin,) = orders.group("billing").positions().values()
            with (
                orders.consumer("billing", delivery="exactly_once") as consumer,
                store.transaction() as tx,
            ):
                tx.commit(consumer)
                batch = consumer.poll(0)
                count = 0 if batch is None else len(batch)
                for _ in range(count):
                    tx.append(paid, b"rest", partition=0)
                    tx.put(jobs, b"rest")
            assert count == 9 - begin.offset
            values = [value for batch in paid.read() for value in batch.values]
            assert values.count(b"rest") == count
            assert [m.value for m in jobs.peek(100)].count(b"rest") == count
            assert b"never" not in [m.value for m in jobs.peek(100)]


def test_compaction_goes_on(golden):
    path, told = golden("compacted"), told_of("compacted")
    with millstream.open(path) as store:
        prices = store.stream("prices")
        for i in range(60):
            prices.append(b"%d EUR" % i * 500, key=b"article-%d" % (i % 2))
        assert prices.compact().records_removed > 0
        with prices.view() as view:
            assert set(view) == {key.encode() for key in told["views"]["prices"]}
    assert inspect.verify(path).problems == []


# damaged ------------------------------------------------------------------------------------------

RECORDS = 30


def value_of(i):
    return b"%d " % i * 1500


def read_on(stream, partition=0):
    """Values up to the damage, and what it raised."""
    found = []
    try:
        for batch in stream.read(partition=partition):
            found += batch.values
    except millstream.MillstreamError as error:
        return found, error
    return found, None


def check_the_rest(store):
    """What the damage did not touch: the other partition, new streams and queues."""
    assert read_on(store.stream("s"), 1)[0][0] == b"other"
    store.stream("s").append(b"x", partition=1)
    store.stream("fresh").append(b"x")
    store.queue("fresh").put(b"x")


def kinds(path):
    return {problem.kind for problem in inspect.verify(path).problems}


def torn_tail(path):
    """The next open ends the log behind the last whole batch, and goes on in a new epoch."""
    assert kinds(path) == set()
    with millstream.open(path) as store:
        s = store.stream("s")
        assert read_on(s) == ([b"%d " % i * 500 for i in range(10)], None)
        at = s.append(b"new")
        assert (at.offset, at.epoch) == (10, 2)
    assert kinds(path) == set()


def corrupt_batch(path):
    """Readers come as far as it, in every open; `repair` takes it out, and nothing else."""
    assert kinds(path) == {"batch"}
    for _ in range(2):
        with millstream.open(path) as store:
            found, error = read_on(store.stream("s"))
            assert found == [value_of(i) for i in range(8)]
            assert isinstance(error, millstream.CorruptBatch)
            check_the_rest(store)
    inspect.repair(path)
    assert kinds(path) == set()
    with millstream.open(path) as store:
        whole = [value_of(i) for i in range(RECORDS) if i != 8]
        assert read_on(store.stream("s")) == (whole, None)


def newer_batch(path):
    """The version is named, and nothing is cut."""
    assert kinds(path) == {"version"}
    for _ in range(2):
        with millstream.open(path) as store:
            found, error = read_on(store.stream("s"))
            assert found == [value_of(i) for i in range(8)]
            assert isinstance(error, millstream.VersionMismatch)
            check_the_rest(store)
    assert kinds(path) == {"version"}


def newer_store(path):
    """Refused in both modes, by name and version; no byte is changed."""
    before = tree_of(path)
    for mode in ("rw", "r"):
        with pytest.raises(millstream.VersionMismatch, match=r"store\.json: format 2.*format 1"):
            millstream.open(path, mode=mode)
    assert kinds(path) == {"version"}
    assert tree_of(path) == before


def made_anew(path):
    """Nothing is lost: it is only a cache, or can be told from the rest."""
    assert kinds(path) == set()
    for more in range(2):
        with millstream.open(path) as store:
            s = store.stream("s")
            whole = [value_of(i) for i in range(RECORDS)] + [b"new"] * more
            assert read_on(s) == (whole, None)
            for offset in range(RECORDS):
                (batch,) = s.read(partition=0, start=offset, max_records=1)
                assert batch.first_offset == offset
            s.append(b"new", partition=0)
            assert [m.value for m in store.queue("q").peek(5)] == [
                b"needle", b"long" * 2000, b"fine"]  # fmt: skip
            check_the_rest(store)
    assert kinds(path) == set()


def missing_segment(path):
    """Readers come as far as it; nothing behind it is taken for the end of the log."""
    assert kinds(path) == {"missing"}
    for _ in range(2):
        with millstream.open(path) as store:
            found, error = read_on(store.stream("s"))
            assert found == [value_of(i) for i in range(14)]
            assert isinstance(error, millstream.CorruptBatch)
            (batch,) = store.stream("s").read(partition=0, start=29, max_records=1)
            assert list(batch.values) == [value_of(29)]
            check_the_rest(store)


def short_segment(path):
    """A file that was cut off is named, and what there is of its partition not touched."""
    assert kinds(path) == {"segment", "missing"}
    before = {name: data for name, data in tree_of(path).items() if "/s/00000/" in name}
    with millstream.open(path) as store:
        found, error = read_on(store.stream("s"))
        assert found == [value_of(i) for i in range(len(found))]
        assert isinstance(error, millstream.CorruptBatch)
        assert "0000000000000002.seg" in error.path
        check_the_rest(store)
    after = {name: data for name, data in tree_of(path).items() if "/s/00000/" in name}
    assert after == before


def damaged_message(path):
    """A message whose bytes are damaged is a dead letter without a value, and stays one."""
    assert kinds(path) == {"message"}
    whole = [b"long" * 2000, b"fine"] if "slot" in path.name else [b"needle", b"fine"]
    with millstream.open(path) as store:
        q = store.queue("q")
        got = q.get_many(5, timeout=0)
        assert [m.value for m in got] == whole
        for m in got:
            m.ack()
        check_the_rest(store)
    with millstream.open(path) as store:
        (letter,) = store.queue("q").dead.list()
        assert (letter.value, letter.reason) == (None, "torn or corrupt")


def damaged_word(path):
    """A state that is none: nobody knows what became of it, so it is kept, as a dead letter."""
    assert kinds(path) == {"message"}
    with millstream.open(path) as store:
        q = store.queue("q")
        assert [m.value for m in q.peek(5)] == [b"long" * 2000, b"fine"]
        (letter,) = q.dead.list()
        assert (letter.value, letter.attempts) == (b"needle", 0)
        check_the_rest(store)
    assert kinds(path) == set()


def torn_position(path):
    """The position before the torn one counts: it only goes back."""
    assert kinds(path) == set()
    with millstream.open(path) as store:
        group = store.stream("s").group("g")
        assert {k: p.offset for k, p in group.positions().items()} == {0: 2, 1: 1}
        with store.stream("s").consumer(group="g", max_records=2) as consumer:
            assert consumer.poll(0).first_offset == 2
        check_the_rest(store)


def lost_position(path):
    """Nobody guesses a position: the group says so until it is set."""
    assert kinds(path) == {"position"}
    with millstream.open(path) as store:
        group = store.stream("s").group("g")
        with pytest.raises(millstream.CorruptBatch, match=r"both copies.*groups seek"):
            group.positions()
        group.seek("earliest", partition=0)
        assert {k: p.offset for k, p in group.positions().items()} == {0: 0, 1: 1}
        check_the_rest(store)
    assert kinds(path) == set()


def damaged_journal_page(path):
    """Made anew: all that the journal says is done once, whether or not it was done before."""
    assert kinds(path) == set()
    with millstream.open(path) as store:
        compare(store, told_of("recorded"))
    assert kinds(path) == set()


def damaged_sequences(path):
    """Records can be read; what is a re-send is not guessed, until `repair`."""
    assert kinds(path) == {"sequences"}
    told = told_of("producers")
    with millstream.open(path) as store:
        orders = store.stream("orders")
        assert records(orders) == told["streams"]["orders"]
        with pytest.raises(millstream.CorruptBatch, match="sequences"):
            orders.producer("ingest-a").append(b"x", sequence=1, partition=0)
        with pytest.raises(millstream.CorruptBatch, match="sequences"):
            _ = orders.producer("ingest-a").last_sequences
        assert records(orders) == told["streams"]["orders"]
    inspect.repair(path)
    assert kinds(path) == set()
    with millstream.open(path) as store:
        for id, last in told["producers"]["orders"].items():
            assert list(store.stream("orders").producer(id).last_sequences) == last


def damaged_view(path):
    """A snapshot is never needed: the view loads from the log."""
    assert kinds(path) == set()
    with millstream.open(path) as store:
        compare(store, told_of("compacted"))


OUTCOMES = {
    "torn_tail": torn_tail, "corrupt_batch": corrupt_batch, "newer_batch": newer_batch,
    "newer_store": newer_store, "short_control": made_anew, "bad_index": made_anew,
    "damaged_hints": made_anew, "damaged_members": made_anew, "missing_segment": missing_segment,
    "short_segment": short_segment, "damaged_slot": damaged_message,
    "damaged_block": damaged_message, "damaged_word": damaged_word,
    "torn_position": torn_position, "lost_position": lost_position,
    "damaged_journal_page": damaged_journal_page, "damaged_sequences": damaged_sequences,
    "damaged_view": damaged_view,
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_becomes_of_damage(golden, name):
    OUTCOMES[name](golden(name))
