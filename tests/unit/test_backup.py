"""A copy while others write is a store of its own, whole up to one moment."""

import os
import stat
import threading

import pytest
from open_copy import copy_open
from timing import until

import millstream
from millstream import (
    Closed,
    InvalidArgument,
    InvalidType,
    Retention,
    StorageError,
    Unsupported,
    inspect,
)
from millstream.disk import files
from millstream.store import backup


def numbers(stream, partition):
    return [int(v[:8]) for batch in stream.read(partition=partition) for v in batch.values]


def test_copy_has_everything_and_is_its_own(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        keep = Retention(records=10**6)
        stream = store.stream("s", partitions=3, segment_bytes=1 << 16, retention=keep)
        stream.append_many(
            [b"%08d" % i + bytes(500) for i in range(900)],
            keys=[b"%d" % i for i in range(900)],
            headers={"h": b"1"},
            timestamps=list(range(900)),
        )
        store.stream("empty", partitions=2)
        store.backup(tmp_path / "copy")
        stream.append(b"later")
    assert inspect.verify(tmp_path / "copy").ok
    for path in [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    with millstream.open(tmp_path / "s") as store, millstream.open(tmp_path / "copy") as copy:
        assert copy.streams() == ["empty", "s"]
        ours, theirs = store.stream("s"), copy.stream("s")
        assert theirs.stats().records == 900
        assert theirs.stats().retention == keep
        for partition in range(3):
            count = theirs.next_offset(partition)
            mine, other = (
                [
                    row
                    for batch in one.read(partition=partition, max_records=count)
                    for row in zip(batch.offsets.tolist(), batch.keys, batch.values, batch.headers,
                                   batch.timestamps.tolist(), strict=True)
                ]
                for one in (ours, theirs)
            )  # fmt: skip
            assert mine == other
        # It goes on by itself.
        assert theirs.append(b"x", partition=0).epoch > 1
        assert ours.next_offset(0) != theirs.next_offset(0) or ours.append(b"y", partition=0)


def test_copies_while_others_write_roll_and_retire(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", partitions=2, segment_bytes=1 << 16)
        stop = threading.Event()
        appended, kept = [0, 0], [0]  # of partition 0: from where on nothing is removed

        def write(partition):
            while not stop.is_set():
                at = appended[partition]
                stream.append_many(
                    [b"%08d" % (at + i) + bytes(900) for i in range(7)], partition=partition
                )
                appended[partition] += 7
                if partition == 0 and at > 700 and at % 70 == 0:
                    stream.delete_before(millstream.Position(0, 1, min(at - 500, kept[0])))

        threads = [threading.Thread(target=write, args=(partition,)) for partition in range(2)]
        for thread in threads:
            thread.start()
        copies = []
        try:
            for turn in range(6):
                until(lambda turn=turn: min(appended) >= 300 * (turn + 1))
                before = list(appended)
                kept[0] = before[0] - 1  # a slow copy would find nothing of what it had seen
                store.backup(tmp_path / f"copy{turn}")
                copies.append((tmp_path / f"copy{turn}", before))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    for path, before in copies:
        report = inspect.verify(path)
        assert report.ok, report.problems
        with millstream.open(path, mode="r") as copy:
            for partition in range(2):
                found = numbers(copy.stream("s"), partition)
                assert found == list(range(found[0], found[-1] + 1))
                assert found[-1] + 1 >= before[partition]
                assert len(found) % 7 == 0 or found[0] > 0
        with millstream.open(path) as copy:
            for partition in range(2):
                stream = copy.stream("s")
                position = stream.append(
                    b"%08d" % stream.next_offset(partition), partition=partition
                )
                assert numbers(stream, partition)[-1] == position.offset


def test_copy_of_a_copy_and_of_a_read_only_store(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        store.stream("s").append_many([b"%08d" % i for i in range(100)])
        with millstream.open(tmp_path / "s", mode="r") as readonly:
            readonly.backup(tmp_path / "one")
    with millstream.open(tmp_path / "one", mode="r") as store:
        assert store.needs_recovery
        store.backup(tmp_path / "two")
    with millstream.open(tmp_path / "two") as store:
        assert numbers(store.stream("s"), 0) == list(range(100))


def test_target_must_be_new_or_empty(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        store.stream("s").append(b"x")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("x")
        (tmp_path / "file").write_text("x")
        for wrong in (tmp_path / "full", tmp_path / "file", tmp_path / "no" / "parent",
                      tmp_path / "s"):  # fmt: skip
            with pytest.raises(StorageError):
                store.backup(wrong)
        with pytest.raises(InvalidArgument, match="within"):
            store.backup(tmp_path / "s" / "copy")
        for wrong in (None, 5):
            with pytest.raises(InvalidType):
                store.backup(wrong)
        assert os.listdir(tmp_path / "full") == ["x"]
        assert "copy" not in os.listdir(tmp_path / "s")
        (tmp_path / "empty").mkdir(0o700)
        store.backup(str(tmp_path / "empty"))
    with pytest.raises(Closed):
        store.backup(tmp_path / "late")
    assert inspect.verify(tmp_path / "empty").ok


def test_copy_has_the_messages_of_queues(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        q = store.queue("q", capacity=100, dedup_window=60.0, ordering="key")
        ids = [q.put(b"%d" % n * n, key=b"%d" % (n % 3), dedup_id=f"{n}") for n in range(40)]
        q.put(b"x" * 100_000, key=b"large")
        q.put(b"later", delay=60)
        q.get().ack()
        q.get().reject("no")
        held = q.get()
        store.queue("empty")
        store.backup(tmp_path / "copy")
        held.ack()
        q.put(b"later still")
    assert inspect.verify(tmp_path / "copy").ok
    with millstream.open(tmp_path / "copy") as copy:
        assert copy.queues() == ["empty", "q"]
        theirs = copy.queue("q")
        theirs._check()
        assert (len(theirs), theirs.stats().dead) == (40, 1)
        assert [theirs.put(b"again", dedup_id=f"{n}") for n in range(40)] == ids
        assert theirs.put(b"new", key=b"large") > max(ids)
        found = {}
        while messages := theirs.get_many(100, timeout=0):
            for m in messages:
                found[m.id] = m.value
            theirs.ack_many(messages)
        assert len(found) == 40  # but for the one that is delayed
        assert b"x" * 100_000 in found.values()
        assert held.id in found
        assert all(
            found.get(number, b"%d" % n * n) == b"%d" % n * n for n, number in enumerate(ids)
        )


def test_copy_of_a_queue_takes_few_writes(tmp_path, monkeypatch):
    """Each write gives the processor to threads that put and get, and waits to have it back."""
    writes = []
    write = files.write

    def counted(descriptor, data, position, path):
        writes.append(len(data))
        write(descriptor, data, position, path)

    with millstream.open(tmp_path / "s", durability="process") as store:
        q = store.queue("q", capacity=10_000, payload_bytes="8MiB")
        ids = q.put_many([b"%d" % n * (1 + n % 3 * 1000) for n in range(2000)])
        for message in q.get_many(500, timeout=0):
            message.ack()
        monkeypatch.setattr(files, "write", counted)
        store.backup(tmp_path / "copy")
    assert len(writes) < 100
    assert inspect.verify(tmp_path / "copy").ok
    with millstream.open(tmp_path / "copy") as copy:
        assert [m.id for m in copy.queue("q").get_many(2000, timeout=0)] == ids[500:]


def test_copy_of_a_queue_under_traffic_has_all_that_stood_throughout(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        q = store.queue("q", capacity=5000, payload_bytes="8MiB", priorities=2)
        standing = {q.put(b"%d" % n * (1500 * (n % 3) + 1), priority=1): n for n in range(300)}
        stop = threading.Event()
        done = []

        def work():
            count = 0
            while not stop.is_set():
                q.put(b"y" * (count % 9000), priority=0, timeout=10)
                m = q.get(timeout=10)
                m.release() if m.id in standing else m.ack()
                count += 1
            done.append(count)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(6):
            store.backup(tmp_path / f"copy-{turn}")
        stop.set()
        for thread in threads:
            thread.join(30)
        print(f"put and acknowledged meanwhile: {sum(done)}")
        assert sum(done) > 100
    for turn in range(6):
        assert inspect.verify(tmp_path / f"copy-{turn}").ok
        with millstream.open(tmp_path / f"copy-{turn}") as copy:
            theirs = copy.queue("q")
            assert theirs.stats().dead == 0
            found = {}
            while messages := theirs.get_many(1000, timeout=0):  # one that was leased comes alone
                found.update({m.id: m.value for m in messages})
            for number, n in standing.items():
                assert found.pop(number) == b"%d" % n * (1500 * (n % 3) + 1)
            assert set(map(len, found.values())) <= set(range(9000))


def test_backup_has_the_positions_of_groups_and_none_of_their_members(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        stream = store.stream("s", partitions=2)
        for partition in range(2):
            stream.append_many([b"a", b"b", b"c"], partition=partition)
        with stream.consumer(group="g", max_records=2) as consumer:
            consumer.poll()
            consumer.commit()
            store.backup(tmp_path / "copy")
    with millstream.open(tmp_path / "copy") as store:
        stream = store.stream("s")
        assert stream.group("g").members() == []
        with stream.consumer(group="g", timeout=0) as consumer:
            assert sum(len(batch) for batch in consumer) == 4


def test_copy_knows_what_a_key_had_before_partitions_were_added(tmp_path, monkeypatch):
    """Also where more of them are added while the copy is made: those are not in it."""
    with millstream.open(tmp_path / "a", durability="process") as store:
        stream = store.stream("s")
        keys = [b"%d" % i for i in range(20)]
        for count in range(3):
            stream.append_many([b"%d" % count] * 20, keys=keys)
            stream.add_partitions(1)
        captured = backup._capture

        def capture(*arguments):
            found = captured(*arguments)
            stream.append_many([b"later"] * 20, keys=keys)
            stream.add_partitions(1)
            return found

        monkeypatch.setattr(backup, "_capture", capture)
        store.backup(tmp_path / "b")
    with millstream.open(tmp_path / "b", durability="process") as store:
        stream = store.stream("s")
        assert stream.partitions == 4
        for value in (b"2", b"3", b"4"):
            with stream.view() as view:
                assert dict(view.items()) == dict.fromkeys(keys, value)
            stream.append_many([b"%d" % (int(value) + 1)] * 20, keys=keys)
            stream.add_partitions(1)


def test_copies_hold_whole_transactions(tmp_path):
    def number(value):
        return int(bytes(value))

    with millstream.open(tmp_path / "s", durability="process") as store:
        source, out, done = store.stream("in"), store.stream("out"), store.stream("done")
        jobs = store.queue("jobs", payload_bytes="1MiB")
        stop, failed = threading.Event(), []

        def feed():
            count = 0
            while not stop.is_set():
                source.append(b"%d" % count)
                count += 1
                stop.wait(0.0005)

        def work(*arguments, **named):
            try:
                with store.pipe(*arguments, **named, batch=5) as pipe:
                    while not stop.is_set():
                        pipe.step(timeout=0.01)
            except BaseException as error:
                failed.append(error)

        threads = [
            threading.Thread(target=feed),
            threading.Thread(
                target=work,
                args=(source, lambda r: {"out": r.value, "jobs": r.value},
                      {"out": out, "jobs": jobs}),
            ),
            threading.Thread(target=work, args=(jobs, lambda m: m.value, done)),
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for turn in range(8):
            store.backup(tmp_path / f"copy{turn}")
            stop.wait(0.05)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert failed == []
        assert len(numbers_of(out)) > 100
    seen = set()
    for turn in range(8):
        assert inspect.verify(tmp_path / f"copy{turn}").ok
        with millstream.open(tmp_path / f"copy{turn}") as copy:
            found, finished = numbers_of(copy.stream("out")), numbers_of(copy.stream("done"))
            waiting = [number(m.value) for m in copy.queue("jobs").peek(10**6)]
            assert len(set(found)) == len(found)
            assert sorted([*waiting, *finished]) == found
            if found:
                assert copy.stream("in").group("pipe").positions()[0].offset == len(found)
            seen.add(len(found))
            with copy.transaction() as tx:
                tx.append(copy.stream("out"), b"9")
            assert len(numbers_of(copy.stream("out"))) == len(found) + 1
    assert len(seen) > 3


def numbers_of(stream):
    return [int(v) for batch in stream.read(partition=0) for v in batch.values]


def test_read_only_copy_of_a_store_with_transactions_needs_it_at_rest(tmp_path):
    with millstream.open(tmp_path / "s") as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    with millstream.open(tmp_path / "s", mode="r") as store:
        with millstream.open(tmp_path / "s"), pytest.raises(Unsupported, match="have it open"):
            store.backup(tmp_path / "copy")
        store.backup(tmp_path / "copy")  # what was refused has left nothing
    with millstream.open(tmp_path / "copy") as store:
        assert store.stream("s").next_offset(0) == 1


def test_backup_that_fails_leaves_nothing_and_touches_no_target_that_is_in_use(tmp_path):
    used = tmp_path / "used"
    (tmp_path / "empty").mkdir()
    used.mkdir()
    (used / "mine").write_text("x")
    with millstream.open(tmp_path / "s") as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    with millstream.open(tmp_path / "s", mode="r") as store, millstream.open(tmp_path / "s"):
        for name in ("new", "empty"):
            with pytest.raises(Unsupported, match="have it open"):
                store.backup(tmp_path / name)
        with pytest.raises(StorageError, match="empty or a new directory"):
            store.backup(used)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []
    assert (used / "mine").read_text() == "x"


def test_reader_copies_a_store_that_was_killed_with_transactions(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream, queue = store.stream("s", partitions=2), store.queue("q", capacity=10)
        queue.put(b"m" * 9000)
        for i in range(5):
            with store.transaction() as tx:
                tx.append(stream, b"%d" % i, key=b"k%d" % i)
                tx.put(queue, b"of %d" % i)
        copy_open(tmp_path / "s", tmp_path / "killed")
    (tmp_path / "killed" / "lost+found").mkdir()
    with millstream.open(tmp_path / "killed", mode="r") as store:
        assert store.needs_recovery
        store.backup(tmp_path / "copy")
    assert not (tmp_path / "copy" / "lost+found").exists()
    assert inspect.verify(tmp_path / "copy").ok
    with millstream.open(tmp_path / "copy") as store:
        assert sum(map(len, store.stream("s").read())) == 5
        assert len(store.queue("q")) == 6
        assert store.queue("q").get(timeout=0).value == b"m" * 9000
        with store.transaction() as tx:
            tx.append(store.stream("s"), b"goes on", key=b"k")


def test_first_transaction_of_all_may_come_while_a_store_without_queues_is_copied(
    tmp_path, monkeypatch
):
    capture = backup._capture
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")

        def captured(*arguments):
            found = capture(*arguments)
            if not store._transactions.exist():
                with store.transaction() as tx:
                    tx.append(stream, b"x")
            return found

        monkeypatch.setattr(backup, "_capture", captured)
        store.backup(tmp_path / "copy")
    with millstream.open(tmp_path / "copy", mode="r") as store:
        assert store.stream("s").next_offset(0) == 1
