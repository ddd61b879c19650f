"""Directories that are moved, replaced or made anew while stores in them are open.

What a process opens later belongs to the directory that it joined: a moved store goes on where it
is, and nothing is written into the one that has its name by then.
"""

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import crash_workers as workers
import pytest

import millstream
from millstream import Compaction, Retention, inspect
from millstream.disk import files
from millstream.inspect import mending
from millstream.log import partition

SMALL = 1 << 16


def tree(path):
    """Names and contents of all that is in a directory."""
    return {
        str(one.relative_to(path)): one.read_bytes() if one.is_file() else None
        for one in sorted(Path(path).rglob("*"))
    }


def values(store, name="s"):
    return [bytes(value) for batch in store.stream(name).read() for value in batch.values]


def sound(path):
    """The store in a directory is whole, as the second reader sees it."""
    report = inspect.verify(path)
    return report.ok or report


def swapped(path):
    """Let a copy take the place of a store that is open; where that went."""
    moved = path.with_name("moved")
    os.rename(path, moved)
    os.rename(path.with_name("copy"), path)
    return moved


@pytest.fixture
def open_store(memory_directory):
    """A store with something of each kind, open, and a copy of it beside it."""
    store = millstream.open(memory_directory / "data", durability="process")
    with store:
        stream = store.stream(
            "s", segment_bytes=SMALL, partitions=2, compact=Compaction(min_dirty=0)
        )
        texts = [b"v%d" % i * 100 for i in range(300)]
        stream.append_many(texts, keys=[b"%d" % (i % 7) for i in range(300)])
        stream.producer("p").append(b"produced", key=b"k", sequence=0)
        stream.consumer("g").close()
        store.stream("gone").append(b"x")
        queue = store.queue("q", capacity=100, dedup_window=60)
        queue.put(b"1", dedup_id="a")
        store.queue("gone")
        with store.transaction() as transaction:
            transaction.append(stream, b"t", key=b"k")
        store.backup(memory_directory / "copy")
        yield store


def test_two_live_stores_over_a_swapped_directory_keep_apart(memory_directory):
    """What one process was told to be stored lay in the files of the other."""
    path = memory_directory / "data"
    with millstream.open(path) as first:
        first.stream("s", segment_bytes=SMALL).append(b"both")
        worker = workers.start("test_moved_directories.append_on_demand", str(path))
        assert workers.line(worker) == "open"
        first.backup(memory_directory / "copy")
    moved = swapped(path)
    with millstream.open(path) as second:
        for i in range(3):
            worker.stdin.write("more\n")
            worker.stdin.flush()
            assert workers.line(worker) == "done"
            for _ in range(5):
                second.stream("s").append_many([b"second %d" % i * 50] * 100)
        assert workers.stop(worker) == 0
    with millstream.open(path) as store:
        assert set(values(store)) == {b"both", *(b"second %d" % i * 50 for i in range(3))}
        assert len(values(store)) == 1501
    with millstream.open(moved) as store:
        assert set(values(store)) == {b"both", b"first" * 50}
        assert len(values(store)) == 1501
    assert sound(path)
    assert sound(moved)


def append_on_demand(path):
    """Append past a roll whenever a line comes."""
    import sys

    with millstream.open(path) as store:
        stream = store.stream("s")
        print("open", flush=True)
        while sys.stdin.readline():
            for _ in range(5):
                stream.append_many([b"first" * 50] * 100)
            print("done", flush=True)


def roll(store):
    for _ in range(10):
        store.stream("s").append_many([b"rolled" * 50] * 100)
    store.stream("s").flush()


def make(store):
    store.stream("new", partitions=2).append(b"1", key=b"k")
    store.queue("new", capacity=10, slot_bytes=128, dedup_window=1).put(b"y" * 1000, dedup_id="a")


def drop(store):
    store.drop_stream("gone")
    store.drop_queue("gone")


def alter(store):
    stream, queue = store.stream("s"), store.queue("q")
    store.stream("gone").alter(retention=Retention(records=10))
    stream.add_partitions(3)
    stream.append(b"in a new partition", key=b"k")
    queue.alter(capacity=5000)
    queue.put_many([b"z" * 3000] * 3000)


def retain(store):
    stream = store.stream("s")
    for _ in range(10):
        stream.append_many([b"retained" * 50] * 100, keys=[b"%d" % (i % 9) for i in range(100)])
    assert stream.compact().records_removed > 100
    logged = store.stream("log", segment_bytes=SMALL, retention=Retention(records=10))
    for _ in range(10):
        logged.append_many([b"retained" * 50] * 100)
    assert logged.enforce_retention() > 0


def group(store):
    with store.stream("s").consumer("g", timeout=0) as consumer:
        for batch in consumer:
            assert len(batch)
            consumer.commit()
            break
    store.stream("s").consumer("other").close()
    store.stream("s").flush()


def produce(store):
    store.stream("s").producer("another").append(b"p", key=b"k", sequence=0)
    store.stream("gone").producer("first").append(b"p", sequence=0)


def transact(store):
    with store.transaction() as transaction:
        transaction.append(store.stream("s"), b"u", key=b"k")
        transaction.put(store.queue("q"), b"v")


def view(store):
    with store.stream("s").view() as latest:
        assert len(latest) > 0


def back_up(store):
    target = Path(store.path).with_name("another copy")
    store.backup(target)
    assert sound(target)
    shutil.rmtree(target)


def nothing(store):
    """Closing alone."""


WORK = [roll, make, drop, alter, retain, group, produce, transact, view, back_up, nothing]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_store_whose_directory_was_replaced_writes_nothing_into_the_other(
    open_store, memory_directory, work
):
    path = memory_directory / "data"
    moved = swapped(path)
    before = tree(path)
    work(open_store)
    open_store.close()
    assert tree(path) == before
    assert sound(moved)
    with millstream.open(path) as other, millstream.open(moved) as store:
        assert values(other)[:300]
        assert values(store)


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_moved_store_goes_on_where_it_is(open_store, memory_directory, work):
    os.rename(memory_directory / "data", memory_directory / "elsewhere")
    work(open_store)
    open_store.close()
    assert not (memory_directory / "data").exists()
    assert sound(memory_directory / "elsewhere")


def test_relative_path_means_the_directory_of_then(memory_directory, monkeypatch):
    for name in ("a", "b"):
        (memory_directory / name).mkdir()
    monkeypatch.chdir(memory_directory / "a")
    with millstream.open("data") as store:
        stream = store.stream("s", segment_bytes=SMALL)
        monkeypatch.chdir(memory_directory / "b")
        roll(store)
        assert stream.next_offset(0) == 1000
    assert not (memory_directory / "b" / "data").exists()
    assert sound(memory_directory / "a" / "data")


def test_path_that_becomes_a_link_to_another_store(open_store, memory_directory):
    os.rename(memory_directory / "data", memory_directory / "moved")
    (memory_directory / "data").symlink_to("copy")
    before = tree(memory_directory / "copy")
    roll(open_store)
    make(open_store)
    open_store.close()
    assert tree(memory_directory / "copy") == before
    assert sound(memory_directory / "moved")


def test_link_that_led_to_the_store_is_turned_to_another(memory_directory):
    for name in ("a", "b"):
        millstream.open(memory_directory / name).close()
    (memory_directory / "current").symlink_to("a")
    with millstream.open(memory_directory / "current") as store:
        (memory_directory / "current").unlink()
        (memory_directory / "current").symlink_to("b")
        before = tree(memory_directory / "b")
        make(store)
    assert tree(memory_directory / "b") == before
    with millstream.open(memory_directory / "a") as store:
        assert store.streams() == ["new"]


def test_temporary_store_removes_what_it_made_and_no_more():
    store = millstream.temporary()
    path, moved = Path(store.path), Path(store.path + ".moved")
    os.rename(path, moved)
    path.mkdir()
    (path / "of others").write_text("x")
    make(store)
    store.close()
    assert [one.name for one in path.iterdir()] == ["of others"]
    assert list(moved.iterdir()) == []
    shutil.rmtree(path)
    moved.rmdir()


@pytest.mark.parametrize("differs", ["device", "id"])
def test_handle_that_was_pickled_is_of_its_file_system(open_store, memory_directory, differs):
    """Directories of two file systems may have one inode number, and in turn one device."""
    path = memory_directory / "data"
    swapped(path)  # for a copy, which has the id
    if differs == "id":
        shutil.rmtree(path)
    with millstream.open(path) as other:
        other.stream("s").append(b"other")
        device, inode = other.session.directory.identity
    before = tree(path)
    if differs == "device":
        device += 1
    open_store.session.directory.identity = device, inode  # as if they were on two mounts in turn
    pickled = pickle.dumps(open_store.stream("s"))
    assert pickle.loads(pickled).store is open_store
    open_store.close()
    with pytest.raises(millstream.StorageError, match="moved or replaced"):
        pickle.loads(pickled)
    assert tree(path) == before


def test_handle_that_was_pickled_is_of_its_directory(open_store, memory_directory):
    path = memory_directory / "data"
    pickled = pickle.dumps(open_store.stream("s"))
    moved = swapped(path)
    with millstream.open(path) as other:
        again = pickle.loads(pickled)
        assert again.store is open_store
        assert pickle.loads(pickle.dumps(other.stream("s"))).store is other
    open_store.close()
    before = tree(path)
    with pytest.raises(millstream.StorageError, match="moved or replaced"):
        pickle.loads(pickled)
    shutil.rmtree(path)
    with pytest.raises(millstream.StorageError, match="moved or replaced"):
        pickle.loads(pickled)
    assert not path.exists(), "none is made"
    os.rename(moved, path)
    assert before
    again = pickle.loads(pickled)
    with again.store:
        assert again.next_offset(0) > 0


def test_transaction_takes_no_handle_of_a_store_that_only_has_the_path(
    open_store, memory_directory
):
    swapped(memory_directory / "data")
    with (
        millstream.open(memory_directory / "data") as other,
        pytest.raises(millstream.InvalidArgument, match="one store"),
        open_store.transaction() as transaction,
    ):
        transaction.append(other.stream("s"), b"x", key=b"k")


def test_closed_directory_is_no_other_ones(memory_directory):
    """A number that the kernel gives to the next directory leads nobody there."""
    with millstream.open(memory_directory / "a") as store:
        kept = store.session.root / "streams"
    with millstream.open(memory_directory / "b") as store:
        store.stream("s")
        with pytest.raises(millstream.Closed, match="a: is closed"):
            files.names(kept)


def made_anew(path, name="s"):
    """Another handle drops a stream and makes one of its name, with records in two segments."""
    with millstream.open(path) as other:
        other.drop_stream(name)
        stream = other.stream(name, segment_bytes=SMALL)
        for _ in range(5):
            stream.append_many([b"of the new one" * 20] * 100)


def test_retention_of_a_dropped_stream_removes_nothing_of_its_successor(
    memory_directory, monkeypatch
):
    with millstream.open(memory_directory / "store", durability="process") as store:
        stream = store.stream("s", segment_bytes=SMALL, retention=Retention(records=1))
        for _ in range(10):
            stream.append_many([b"old" * 100] * 100)
        keep = partition.sequences.keep

        def dropped_meanwhile(log, position):
            monkeypatch.setattr(partition.sequences, "keep", keep)
            made_anew(store.path)
            return keep(log, position)

        monkeypatch.setattr(partition.sequences, "keep", dropped_meanwhile)
        # Its own files are gone: what is not mapped any more is not found, or said to be dropped.
        with contextlib.suppress(millstream.NotFound, millstream.Closed):
            stream._retire(stream._log(0))
        assert len(values(store)) == 500
        assert store.stream("s").first_offset(0) == 0
    assert sound(memory_directory / "store")


def test_segment_of_a_dropped_stream_is_not_put_into_its_successor(memory_directory, monkeypatch):
    with millstream.open(memory_directory / "store", durability="process") as store:
        stream = store.stream("s", segment_bytes=SMALL)
        stream.append(b"old")
        log, allocate = stream._log(0), files.allocate

        def dropped_meanwhile(*arguments):
            monkeypatch.setattr(files, "allocate", allocate)
            made_anew(store.path)
            allocate(*arguments)

        monkeypatch.setattr(files, "allocate", dropped_meanwhile)
        with pytest.raises(millstream.MillstreamError):
            log.make_segment(9, 100)
        names = os.listdir(memory_directory / "store" / "streams" / "s" / "00000")
        assert f"{9:016d}.seg" not in names
        assert len(values(store)) == 500


@pytest.fixture
def two_stores(memory_directory):
    """A store that nobody has open, at "data", and a copy of it beside."""
    path = memory_directory / "data"
    with millstream.open(path) as store:
        for name in ("a", "b"):
            store.stream(name).append_many([b"x" * 100] * 100)
    shutil.copytree(path, memory_directory / "copy")
    return path


def test_verify_of_a_directory_that_is_replaced_meanwhile_is_no_report(two_stores):
    def replaced(done, of):
        if two_stores.with_name("copy").exists():
            swapped(two_stores)

    with pytest.raises(millstream.StorageError, match="moved or replaced"):
        inspect.verify(two_stores, progress=replaced)
    assert sound(two_stores)


def test_records_of_two_directories_are_not_taken_for_those_of_one(two_stores):
    records = inspect.records(two_stores)
    next(records)
    swapped(two_stores)
    with pytest.raises(millstream.StorageError, match="moved or replaced"):
        list(records)


@pytest.mark.parametrize("step", ["copy", "link", "replace", "fsync"])
def test_repair_writes_nothing_into_a_store_that_took_the_place(two_stores, monkeypatch, step):
    """Nor where that happens behind the last look, between two calls."""
    segment = two_stores / "streams" / "a" / "00000" / f"{1:016d}.seg"
    with open(segment, "r+b") as file:
        file.seek(inspect.store(two_stores).streams["a"].partitions[0][0].data_position + 200)
        file.write(b"damage")
    assert inspect.verify(two_stores).problems
    before = tree(two_stores.with_name("copy"))
    module, name = (mending, "copy_changed") if step == "copy" else (os, step)
    call = getattr(module, name)

    def replaced(*arguments, **named):
        monkeypatch.setattr(module, name, call)
        if step != "copy":
            swapped(two_stores)
        call(*arguments, **named)
        if step == "copy":
            swapped(two_stores)

    monkeypatch.setattr(module, name, replaced)
    with pytest.raises(millstream.StorageError, match="moved or replaced"):
        inspect.repair(two_stores)
    assert tree(two_stores) == before
