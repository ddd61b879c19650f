"""Compaction: what stays is what has no successor, at its offset; nobody notices but the disk."""

import gc
import itertools
import json
import os
import random
import select
import subprocess
import sys
import threading
import time

import pytest
from timing import SOON, until

import millstream
from millstream import _native, cli, inspect
from millstream._native import Position
from millstream.disk import files
from millstream.log import compaction
from millstream.log.segments import Segments
from millstream.testing import clock

SMALL = 1 << 16
NOW = millstream.Compaction(tombstone_age=0)


def contents(stream, **how):
    """Offset to (key, value) of all that is read, by partition."""
    found = {}
    for batch in stream.read(**how):
        rows = zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True)
        for offset, key, value in rows:
            place = batch.partition, offset
            assert place not in found
            key, value = (None if part is None else bytes(part) for part in (key, value))
            found[place] = key, value
    return found


def latest(records):
    """The last value of each key, tombstones left out."""
    found = {}
    for place in sorted(records):
        key, value = records[place]
        if key is not None:
            found[place[0], key] = value
    return {key: value for key, value in found.items() if value is not None}


def fill(stream, count, keys, *, seed=0, tombstones=0.1, keyless=0.05, size=200):
    """Append at random, one by one and in batches; what was appended, by place."""
    chance = random.Random(seed)
    done = {}
    while len(done) < count:
        many = chance.choice((1, 1, 1, 2, 50))
        rows = [
            (
                None if chance.random() < keyless else b"k%d" % chance.randrange(keys),
                None
                if chance.random() < tombstones
                else b"%d " % len(done) + b"v" * chance.randrange(size),
            )
            for _ in range(many)
        ]
        headers = [{"h": b"%d" % len(done)}] * many if chance.random() < 0.2 else None
        for key, value in rows[:1] if many == 1 else ():
            position = stream.append(value, key=key, headers=headers and headers[0])
            done[position.partition, position.offset] = key, value
        if many > 1:
            index = chance.randrange(stream.partitions)
            (span,) = stream.append_many(
                [value for _, value in rows],
                keys=[key for key, _ in rows],
                partition=index,
                headers=headers,
                timestamps=[chance.randrange(1 << 40) for _ in rows],
            )
            for i, row in enumerate(rows):
                done[index, span.first_offset + i] = row
    return done


def check(stream, appended):
    """Every offset has its record or none, every key its last value; counts agree."""
    found = contents(stream)
    assert all(appended[place] == record for place, record in found.items())
    by_key = {place: record for place, record in appended.items() if record[0] is not None}
    assert latest(found) == latest(by_key)
    keyless = {place for place, record in appended.items() if record[0] is None}
    assert keyless <= set(found)
    assert stream.stats().records == len(found)
    return found


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def verified(store):
    store.close()
    report = inspect.verify(store.path)
    assert report.problems == []


@pytest.mark.parametrize("seed", range(4))
def test_last_of_each_key_stays_at_its_offset(store, seed):
    stream = store.stream("s", partitions=1 + seed % 2, segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 3000, 200, seed=seed)
    result = stream.compact()
    assert result.records_removed > 1500
    assert result.bytes_after < result.bytes_before / 2
    found = check(stream, appended)
    assert len(found) == len(appended) - result.records_removed
    again = stream.compact()
    assert again.records_removed == again.tombstones_removed > 0, "tombstones that were cleaned"
    assert stream.compact().records_removed == 0
    check(stream, appended)
    verified(store)


def test_appends_go_on_and_later_runs_see_them(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = {}
    for seed in range(5):
        appended.update(fill(stream, 600, 100, seed=seed))
        stream.compact()
        check(stream, appended)
    verified(store)


def test_more_keys_than_fit_the_memory_take_more_rounds(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 4000, 300)
    result = stream.compact(memory=32 * 100)
    assert result.rounds > 2
    found = check(stream, appended)
    sealed = [o for _, o in found if o < stream.next_offset(0) * 0.9]
    assert len(sealed) < 800
    with pytest.raises(millstream.InvalidArgument):
        stream.compact(memory=8)


def test_one_key_at_a_time_is_slow_not_wrong(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 1200, 10, size=600)
    assert stream.compact(memory=32).rounds > 100
    check(stream, appended)
    verified(store)


def test_active_segment_and_young_records_stay(store):
    stream = store.stream("s", compact=millstream.Compaction(min_age="1h"), segment_bytes=SMALL)
    fill(stream, 1500, 3)
    before = contents(stream)
    result = stream.compact()
    assert (result.segments, result.records_removed) == (0, 0)
    stream.alter(compact=millstream.Compaction())
    assert stream.compact().segments == stream.stats().partitions[0].segments - 1
    active = max(offset for _, offset in before)
    assert (0, active) in contents(stream)


def test_tombstone_stays_for_its_age_then_goes(store):
    keep = millstream.Compaction(tombstone_age="1h")
    stream = store.stream("s", segment_bytes=SMALL, compact=keep)
    stream.append(b"old", key=b"gone")
    stream.append(None, key=b"gone")
    fill(stream, 1000, 5, keyless=0, tombstones=0)
    stream.compact()
    assert contents(stream)[0, 1] == (b"gone", None)
    assert (0, 0) not in contents(stream)
    stream.compact()
    assert (0, 1) in contents(stream)
    with clock() as virtual:
        virtual.advance(3601)
        assert stream.compact().tombstones_removed == 1
    assert (0, 1) not in contents(stream)


def test_tombstone_is_not_dropped_before_what_it_deletes(store, monkeypatch):
    """A segment that would not get smaller stays, with a superseded record: its tombstone must."""
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    stream.append_many([b"x" * 60, b"y" * 60_000], keys=[b"gone", b"other"])
    stream.append(b"z" * 60_000, key=b"next")
    stream.append(None, key=b"gone")
    stream.append(b"z" * 60_000, key=b"more")
    stream.append(b"z" * 60_000, key=b"active")

    class Stubborn:
        """Survivors of the first segment, that cannot be made smaller."""

        def __init__(self, *arguments):
            self.real = real(*arguments)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def measure(self):
            return None if self.real.segment.number == 1 else self.real.measure()

    real = _native.Survivors
    monkeypatch.setattr(_native, "Survivors", Stubborn)
    for _ in range(3):
        stream.compact()
    assert contents(stream)[0, 0] == (b"gone", b"x" * 60)
    assert (b"gone", None) in contents(stream).values()
    monkeypatch.undo()
    stream.compact()
    assert b"gone" not in {key for key, _ in contents(stream).values()}


def test_find_and_seek_over_gaps(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    for i in range(3000):
        stream.append(b"%d" % i * 20, key=b"k%d" % (i % 7), timestamp=i * 1000)
    stream.compact()
    kept = sorted(offset for _, offset in contents(stream))
    assert 7 <= len(kept) < 1500
    for offset in [*range(0, 3000, 97), *kept[:10]]:
        expected = next(one for one in kept if one >= offset)
        batch = next(stream.read(partition=0, start=offset))
        assert batch.first_offset == expected
        assert stream.offset_at(offset * 1000, 0) == expected
    assert stream.first_offset(0) == 0
    assert stream.next_offset(0) == 3000
    assert sum(len(batch) for batch in stream.read(start=0)) == len(kept)


def test_reader_in_the_middle_goes_on_in_what_it_has_and_in_what_is_new(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 3000, 100)
    readers = []
    for step in range(0, 2000, 131):
        one = stream.read(max_records=10_000)
        seen = [batch for batch, _ in zip(one, range(step // 40), strict=False)]
        readers.append((one, seen))
    kept = [
        (batch, list(map(bytes, batch.keys[:3])))
        for _, seen in readers
        for batch in seen[:2]
        if None not in batch.keys[:3]
    ]
    stream.compact()
    store._streams.cache.clear()  # as where more is open than maps may be
    for one, seen in readers:
        offsets = [int(offset) for batch in [*seen, *one] for offset in batch.offsets]
        assert offsets == sorted(set(offsets))
        read = {(0, offset): appended[0, offset] for offset in offsets}
        by_key = {place: record for place, record in appended.items() if record[0] is not None}
        assert latest(read) == latest(by_key)
    assert all(list(map(bytes, batch.keys[:3])) == keys for batch, keys in kept)


def test_file_that_is_replaced_while_it_is_mapped_does_not_come_back(store, monkeypatch):
    """A reader is slow to map a segment; meanwhile runs take a record, and then its tombstone."""
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    gone = b"gone" * 1_000
    for key in (gone, b"kept", None):
        stream.append(b"v" * 16_000, key=key)
    stream.append(b"v" * 16_000)
    stream.append(None, key=gone)
    stream.append(b"2", key=b"kept")
    for _ in range(3):
        stream.append(b"v" * 60_000)
    log, map_file = stream._log(0), files.map_file
    number = log.segments.current()[0]

    def slow(*arguments, **how):
        monkeypatch.setattr(files, "map_file", map_file)
        found = map_file(*arguments, **how)
        assert [stream.compact().tombstones_removed for _ in range(2)] == [0, 1]
        return found

    log.segments.drop(number)
    monkeypatch.setattr(files, "map_file", slow)
    log.segments.segment(number)
    stream.append_many([b"v" * 60_000, b"v" * 60_000])
    stream.compact()
    assert {key for key, _ in contents(stream).values()} == {None, b"kept"}


def test_maps_may_come_while_replaced_ones_are_let_go(store):
    """Another thread maps a segment, since collecting garbage lets it run."""
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    fill(stream, 500, 50)
    stream.append_many([b"v" * 60_000] * 2)
    stream.compact()
    log = stream._log(0)
    log.segments._inodes.update(
        dict.fromkeys(range(1_000, 6_000), 1)
    )  # more than tuples that were kept
    threshold, other = gc.get_threshold(), itertools.count(10_000)

    def maps(*_):
        log.segments._inodes[next(other)] = 0

    gc.callbacks.append(maps)
    gc.set_threshold(1, 1 << 30, 1 << 30)
    try:
        log.segments.refresh()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(maps)
    assert not set(range(1_000, 6_000)) & set(log.segments._inodes)


def test_cursor_of_a_replaced_file_goes_on_by_offset(store):
    """More than 16 partitions: readers hold no map between batches, so they find the new file."""
    stream = store.stream("s", partitions=20, segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 30_000, 40, size=400, keyless=0)
    reading = stream.read()
    offsets = {index: [] for index in range(20)}
    for _ in range(60):
        batch = next(reading)
        offsets[batch.partition].extend(batch.offsets.tolist())
    stream.compact()
    store._streams.cache.clear()
    for batch in reading:
        offsets[batch.partition].extend(batch.offsets.tolist())
    for index, found in offsets.items():
        assert found == sorted(set(found))
        read = {(index, offset): appended[index, offset] for offset in found}
        mine = {place: record for place, record in appended.items() if place[0] == index}
        assert latest(read) == latest(mine)


def read_through(path):
    """In another process: read all again and again, and once after a line came; say what came."""
    with millstream.open(path, mode="r") as store:
        stream = store.stream("s")
        print("open", flush=True)
        is_last = False
        while not is_last:
            is_last = bool(select.select([sys.stdin], [], [], 0)[0])
            records = contents(stream)
            keys = sorted({key.decode() for key, _ in records.values() if key is not None})
            print(json.dumps([len(records), len(keys)]), flush=True)


def test_readers_of_another_process_read_through_compactions(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 2000, 50, tombstones=0, keyless=0)
    code = f"import test_compaction as t; t.read_through({store.path!r})"
    command = [sys.executable, "-c", code]
    directory = os.path.dirname(__file__)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=directory) as reader:
        assert reader.stdout.readline() == "open\n"
        lines = []
        for seed in range(1, 7):
            appended.update(fill(stream, 400, 50, seed=seed, tombstones=0, keyless=0))
            stream.compact()
            lines.append(json.loads(reader.stdout.readline()))
        print("last", file=reader.stdin, flush=True)
        lines += [json.loads(line) for line in reader.stdout]
    assert reader.returncode == 0
    assert len(lines) >= 7
    assert all(keys == 50 for _, keys in lines)
    assert lines[-1][0] < 2000
    check(stream, appended)


def test_retention_counts_what_is_there(store):
    keep = millstream.Retention(records=600, bytes="1MiB")
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW, retention=keep)
    store._background.stop()
    for i in range(4000):
        stream.append(b"v" * 300, key=b"%d" % (i % 250))
    stream.compact()
    assert stream.enforce_retention() == 0, "400 records are left of 4,000"
    assert stream.stats().records < 600
    for i in range(600):
        stream.append(b"v" * 300, key=b"n%d" % i)
    assert stream.enforce_retention() > 3
    assert stream.first_offset(0) > 0
    first = next(stream.read()).first_offset
    assert first >= stream.first_offset(0)
    gone = stream.delete_before(millstream.Position(0, 1, 4100))
    assert stream.first_offset(0) == gone > 0
    verified(store)


def test_backup_of_a_compacted_stream_is_as_small(store, tmp_path):
    stream = store.stream("s", segment_bytes=1 << 20, compact=NOW)
    appended = fill(stream, 6000, 20, size=2000)
    stream.compact()
    found = contents(stream)
    store.backup(tmp_path / "copy")
    with millstream.open(tmp_path / "copy") as copy:
        assert contents(copy.stream("s")) == found
        again = copy.stream("s").stats().allocated_bytes
        assert copy.stream("s").compact().records_removed >= 0
    assert again <= stream.stats().allocated_bytes
    check(stream, appended)


@pytest.mark.parametrize("clean", [True, False])
def test_reopened_store_has_the_same(store, clean):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 3000, 100)
    stream.compact()
    before, stats = contents(stream), stream.stats()
    store.close()
    if not clean:
        path = os.path.join(store.path, "store.json")
        files.write_json(path, {**files.read_json(path), "clean": False})
    with millstream.open(store.path) as again:
        stream = again.stream("s")
        assert contents(stream) == before
        assert stream.stats().records == stats.records
        assert stream.stats().allocated_bytes <= stats.allocated_bytes + (256 << 10)
        appended.update(fill(stream, 500, 100, seed=9))
        stream.compact()
        check(stream, appended)
    with millstream.open(store.path, mode="r") as again:
        check(again.stream("s"), appended)
        with pytest.raises(millstream.Unsupported):
            again.stream("s").compact()


def test_background_compacts_when_enough_is_dirty(store, monkeypatch):
    from millstream.store import compactor

    monkeypatch.setattr(compactor, "VISIT_SECONDS", 0.02)
    monkeypatch.setattr(compactor, "CHANGED_SECONDS", 0.02)
    keep = millstream.Compaction(min_dirty=0.5, max_rate="1GiB")
    stream = store.stream("s", segment_bytes=SMALL, compact=keep)
    appended = fill(stream, 2000, 50)
    assert stream.stats().compaction == keep
    stream.flush()
    until(lambda: stream.stats().partitions[0].compacted_at is not None)
    part = stream.stats().partitions[0]
    assert part.dirty == 0.0
    assert part.records < 1000
    assert abs(part.compacted_at - time.time()) < 60
    check(stream, appended)


def test_rate_is_kept_and_closing_ends_the_run(store, monkeypatch):
    from millstream.store import compactor

    monkeypatch.setattr(compactor, "VISIT_SECONDS", 0.01)
    monkeypatch.setattr(compactor, "CHANGED_SECONDS", 0.01)
    keep = millstream.Compaction(min_dirty=0.0, max_rate="64KiB")  # would take a minute
    stream = store.stream("s", segment_bytes=SMALL, compact=keep)
    appended = fill(stream, 10_000, 50)
    stream.flush()
    word = stream._log(0).native.word("compact", "test", 0.0)
    until(lambda: word.value)
    with pytest.raises(millstream.LockTimeout, match="compact"):
        stream.compact(timeout=0.05)
    begun = time.monotonic()
    store.close()
    assert time.monotonic() - begun < SOON
    with millstream.open(store.path) as again:
        check(again.stream("s"), appended)


def test_progress_comes_and_may_end_it(store):
    # Without a setting the background leaves it alone: it would be the one whom nobody ends.
    stream = store.stream("s", partitions=2, segment_bytes=SMALL)
    appended = fill(stream, 3000, 50)
    seen = []
    stream.compact(progress=seen.append)
    assert {one.partition for one in seen} == {0, 1}
    for one in seen:
        assert 0 <= one.done_bytes <= one.total_bytes
    ends = {one.partition: one for one in seen}
    assert all(one.done_bytes > 0.9 * one.total_bytes for one in ends.values())
    appended.update(fill(stream, 1500, 50, seed=1))

    def enough(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.compact(progress=enough)
    check(stream, appended)
    stream.compact()
    assert not [name for name in os.listdir(stream.path + "/00000") if name.endswith(".tmp")]
    check(stream, appended)


def test_configuration_is_stored_and_altered(store):
    keep = millstream.Compaction(min_dirty=0.3, min_age="1h", tombstone_age=7)
    stream = store.stream("s", compact=keep)
    assert store.stream("s", compact=keep) is stream
    with pytest.raises(millstream.ConfigMismatch, match="alter"):
        store.stream("s", compact=millstream.Compaction())
    assert store.stream("plain").compaction is None
    stream.alter(compact=None)
    assert stream.compaction is None
    stream.alter(compact=keep, retention=millstream.Retention(records=5))
    with millstream.open(store.path) as other:
        assert other.stream("s").compaction == keep
    for wrong in ("x", 5, millstream.Retention()):
        with pytest.raises(millstream.InvalidType):
            store.stream("t", compact=wrong)
    for name, value in {"min_dirty": 2, "min_age": -1, "tombstone_age": "?", "max_rate": 1}.items():
        with pytest.raises(millstream.InvalidArgument):
            millstream.Compaction(**{name: value})


def test_damage_ends_the_run_before_anything_is_changed(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    fill(stream, 2000, 50)
    path = os.path.join(stream.path, "00000", f"{3:016d}.seg")
    stream.flush()
    store._streams.cache.clear()
    with open(path, "r+b") as file:
        file.seek(20_000)
        file.write(b"damage")
    before = sorted(os.stat(entry.path).st_ino for entry in os.scandir(os.path.dirname(path)))
    with pytest.raises(millstream.CorruptBatch):
        stream.compact()
    after = sorted(os.stat(entry.path).st_ino for entry in os.scandir(os.path.dirname(path)))
    assert before == after


@pytest.mark.parametrize(
    "where, name",
    [
        (compaction, "dirt"),
        (compaction.Run, "_search_elsewhere"),
        (compaction.Run, "_stamp"),
        (Segments, "segment"),
    ],
)
def test_retention_may_take_any_segment_while_it_runs(store, monkeypatch, where, name):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    fill(stream, 1_000, 100)
    last = stream.append_many([b"v" * 60_000] * 3)[0]
    call, done = getattr(where, name), []

    def late(*arguments, **how):
        if not done and (name != "segment" or how.get("write")):
            done.append(True)
            stream.delete_before(Position(0, last.epoch, last.first_offset))
        return call(*arguments, **how)

    monkeypatch.setattr(where, name, late)
    stream.compact(memory=_native.KEY_BYTES * 10)
    assert done
    assert {value for _, value in contents(stream).values()} == {b"v" * 60_000}


def test_stream_is_dropped_while_the_background_looks_at_another(store):
    stream = store.stream("s", compact=NOW)
    compactor = store._background._compactor

    class Looked:
        @property
        def stream(self):
            compactor._seen[object()] = 0.0, (0, 0, 0)

    compactor._seen[Looked()] = 0.0, (0, 0, 0)
    store.drop_stream("s")
    assert stream.closed and not store.streams()


def test_two_that_compact_at_once_take_turns(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 4000, 100)
    with millstream.open(store.path) as other:
        results = []
        threads = [
            threading.Thread(target=lambda one=one: results.append(one.compact(timeout=60)))
            for one in (stream, other.stream("s"), stream)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 3
        check(stream, appended)
        check(other.stream("s"), appended)
    verified(store)


def test_command_line(store, capsys):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    appended = fill(stream, 2000, 50)
    assert cli.main(["compact", store.path, "s", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["records_removed"] > 1000
    assert cli.main(["compact", store.path, "s", "--memory", "1MiB"]) == 0
    assert "segments read," in capsys.readouterr().out
    assert cli.main(["compact", store.path, "none"]) == 3
    assert cli.main(["info", store.path, "s", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["streams"][0]["compaction"] == NOW.as_dict()
    check(stream, appended)


def test_producers_keep_their_sequences(store):
    """Also where all their records went; and the headers say it as well as what is saved."""
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    for name in ("one", "two"):
        producer = stream.producer(id=name)
        for sequence in range(400):
            producer.append(b"%d" % sequence * 50, key=b"k", sequence=sequence)
    for i in range(1000):
        stream.append(b"%d" % i * 50, key=b"k")
    stream.compact()
    assert stream.stats().records < 1000
    store.close()
    headers = {}
    for log in inspect.reading.logs(store.path):
        for batch in log.events():
            if isinstance(batch, inspect.columns.Batch) and batch.producer:
                headers[batch.producer] = batch.sequence
    assert set(headers.values()) == {399}, "the headers still say it"
    with millstream.open(store.path) as again:
        stream = again.stream("s")
        before = stream.next_offset(0)
        for name in ("one", "two"):
            producer = stream.producer(id=name)
            assert producer.last_sequence == 399
            for sequence in range(395, 400):
                producer.append(b"again", key=b"k", sequence=sequence)
            assert stream.next_offset(0) == before
            producer.append(b"new", key=b"k", sequence=400)
            before += 1
            assert stream.next_offset(0) == before
    verified(again)


def test_records_of_transactions_are_compacted_and_not_applied_twice(store):
    stream = store.stream("s", segment_bytes=SMALL, compact=NOW)
    for i in range(200):
        with store.transaction() as tx:
            tx.append(stream, b"%d" % i * 400, key=b"k%d" % (i % 3))
    result = stream.compact()
    assert result.records_removed > 100
    before = contents(stream), stream.next_offset(0)
    store.close()
    path = os.path.join(store.path, "store.json")
    files.write_json(path, {**files.read_json(path), "clean": False})
    with millstream.open(store.path) as again:
        stream = again.stream("s")
        assert (contents(stream), stream.next_offset(0)) == before
    verified(again)
