"""What an append, or its error, reports as stored becomes as durable as was asked for."""

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from timing import SOON, until

import millstream
from millstream.disk import files
from millstream.errors import Indeterminate, StorageError, StoreFull
from millstream.log.partition import PartitionLog

PARTITIONS = 4
KEYS = [b"%d" % i for i in range(64)]
SECONDS = 30.0


@pytest.fixture
def stream(tmp_path):
    """A stream of level sync: what its errors say is what this file is about."""
    with contextlib.ExitStack() as stack:
        store = millstream.open(tmp_path / "store", durability="sync")
        stack.callback(close, store)
        yield store.stream("s", partitions=PARTITIONS)


def close(store):
    with contextlib.suppress(millstream.MillstreamError):  # what the test has poisoned
        store.close()


def refuse_segments(monkeypatch, partition, error):
    """No segment can be made in one partition."""
    real = PartitionLog.make_segment

    def make(self, number, need_bytes):
        if self.index == partition:
            raise error
        real(self, number, need_bytes)

    monkeypatch.setattr(PartitionLog, "make_segment", make)


def fail_syncs(monkeypatch, where, error):
    """Syncs of files whose path has a text in it fail; the paths of all that were asked for."""
    real, asked = files.sync, []

    def sync(descriptor, path):
        asked.append(path)
        if where in path:
            raise error
        real(descriptor, path)

    monkeypatch.setattr(files, "sync", sync)
    return asked


def assert_durable(stream, spans):
    for span in spans:
        assert stream.durable_offset(span.partition) >= span.first_offset + span.count, span


def append_by_stream(stream, first=0):
    return stream.append_many(KEYS, keys=KEYS)


def append_by_producer(stream, first=0):
    keys = sorted(KEYS, key=stream.partition_for)  # the share with the last record goes last
    return stream.producer("p").append_many(keys, keys=keys, first_sequence=first)


CALLS = [append_by_stream, append_by_producer]


@pytest.mark.parametrize("append", CALLS)
def test_shares_before_one_that_has_no_room_are_durable(stream, monkeypatch, append):
    refuse_segments(monkeypatch, PARTITIONS - 1, StoreFull(errno.ENOSPC, "injected", "x"))
    with pytest.raises(StoreFull) as raised:
        append(stream)
    assert len(raised.value.appended) == PARTITIONS - 1
    assert_durable(stream, raised.value.appended)


def test_a_directory_that_became_a_file_is_a_storage_error_behind_shares_that_are_durable(
    tmp_path,
):
    with millstream.open(tmp_path, durability="sync") as store:
        stream = store.stream("s", partitions=PARTITIONS, segment_bytes="64KiB")
        for partition in range(PARTITIONS):
            stream.append(b"a", partition=partition)
        directory = tmp_path / "streams" / "s" / f"{PARTITIONS - 1:05}"
        directory.rename(tmp_path / "away")
        directory.touch()
        with pytest.raises(StorageError) as raised:  # no segment has room for so much
            stream.append_many([bytes(30_000)] * len(KEYS), keys=KEYS)
        assert type(raised.value) is StorageError
        assert len(raised.value.appended) == PARTITIONS - 1
        assert_durable(stream, raised.value.appended)
        with pytest.raises(StorageError):
            stream.stats()
        directory.unlink()
        (tmp_path / "away").rename(directory)


@pytest.mark.parametrize("append", CALLS)
def test_a_share_whose_sync_fails_is_published_and_the_others_are_appended(
    stream, monkeypatch, append
):
    append(stream)
    fail_syncs(monkeypatch, f"{os.sep}00001{os.sep}", StorageError(errno.EIO, "injected", "x"))
    with pytest.raises(Indeterminate) as raised:
        append(stream, 100)
    assert [span.partition for span in raised.value.published] == [1]
    # A producer's last share is not stored before the others are durable.
    others = [0, 2] if append is append_by_producer else [0, 2, 3]
    assert [span.partition for span in raised.value.appended] == others
    assert_durable(stream, raised.value.appended)


@pytest.mark.parametrize("append", CALLS)
def test_ctrl_c_between_shares_leaves_what_is_stored_to_the_background(stream, monkeypatch, append):
    refuse_segments(monkeypatch, PARTITIONS - 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        append(stream)
    there = [index for index in range(PARTITIONS) if stream.next_offset(index)]
    assert len(there) == PARTITIONS - 1
    until(lambda: all(stream.durable_offset(i) == stream.next_offset(i) for i in there))


def test_ctrl_c_in_the_sync_of_one_record_leaves_it_to_the_background(stream, monkeypatch):
    stream.append(b"a", partition=0)
    with monkeypatch.context() as patch:
        fail_syncs(patch, ".seg", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stream.append(b"b", partition=0)
    assert stream.next_offset(0) == 2
    until(lambda: stream.durable_offset(0) == 2)


def test_a_chunk_of_arrow_data_that_fails_leaves_durable_ones(stream, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"value": pa.chunked_array([[b"a", b"b"], [b"c", b"d"], [b"e"]])})
    real, calls = PartitionLog.wait_durable, []

    def wait(self, position, deadline, *, late=True):
        calls.append(position)
        if len(calls) == 2:
            raise StorageError(errno.EMFILE, "injected", self.path)
        real(self, position, deadline, late=late)

    monkeypatch.setattr(PartitionLog, "wait_durable", wait)
    with pytest.raises(Indeterminate) as raised:
        stream.append_arrow(table, partition=0, timeout=10.0)
    assert [tuple(span) for span in raised.value.appended] == [(0, 1, 0, 2)]
    assert [tuple(span) for span in raised.value.published] == [(0, 1, 2, 2)]
    assert_durable(stream, raised.value.appended)


def test_flush_syncs_the_partitions_behind_one_that_fails(tmp_path, monkeypatch):
    store = millstream.open(tmp_path / "store", durability="process")
    stream, queue = store.stream("s", partitions=PARTITIONS), store.queue("q")
    stream.append_many(KEYS, keys=KEYS)
    queue.put(b"a")
    where = f"{os.sep}00000{os.sep}"
    asked = fail_syncs(monkeypatch, where, StorageError(errno.EIO, "injected", "x"))
    with pytest.raises(StorageError):
        store.flush()
    durable = [stream.durable_offset(index) == stream.next_offset(index) for index in range(4)]
    assert durable == [False, True, True, True]
    assert any(path.endswith("slots") for path in asked)
    close(store)


def test_a_commit_that_fails_in_one_partition_is_durable_in_those_before(stream, monkeypatch):
    stream.append_many(KEYS, keys=KEYS)
    with stream.consumer(group="g") as consumer:
        for _ in range(PARTITIONS):
            assert consumer.poll(10.0) is not None
        real = consumer.group._await_log

        def wait(partition, offset):
            if partition == PARTITIONS - 1:
                raise StorageError(errno.EMFILE, "injected", "x")
            real(partition, offset)

        monkeypatch.setattr(consumer.group, "_await_log", wait)
        asked = fail_syncs(monkeypatch, "nothing", OSError())
        with pytest.raises(StorageError):
            consumer.commit()
        set_ = [p for p, at in consumer.group.positions().items() if at is not None]
        assert set_ == [0, 1, 2]
        assert any(path.endswith(".group") for path in asked)


def test_messages_put_before_a_wait_for_room_are_synced_meanwhile(tmp_path, monkeypatch):
    synced = threading.Event()
    real = files.sync

    def sync(descriptor, path):
        real(descriptor, path)
        if path.endswith("slots"):
            synced.set()

    with millstream.open(tmp_path / "store", durability="interval") as store:
        queue = store.queue("q", capacity=2)
        monkeypatch.setattr(files, "sync", sync)
        items = [b"a", b"b", b"c"]
        thread = threading.Thread(target=queue.put_many, args=(items, None))
        thread.start()
        assert synced.wait(SECONDS)
        queue.get(timeout=SECONDS).ack()
        thread.join(SECONDS)
        assert len(queue) == 2


# --- an error although it is stored ---------------------------------------------------------------


def test_a_configuration_that_cannot_be_read_is_said_before_anything_is_stored(
    tmp_path, monkeypatch
):
    with millstream.open(tmp_path / "store") as store:
        stream = store.stream("s")
        stream.append(b"a")
        other = store.stream("s", durability="process")
        other.alter(retention=millstream.Retention(records=1000))

        def read_json(path):
            raise StorageError(errno.EMFILE, "injected", path)

        with monkeypatch.context() as patch:
            patch.setattr(files, "read_json", read_json)
            stream._opened()[0].native.take_written()
            with pytest.raises(StorageError) as raised:
                stream.append(b"b")
            assert not isinstance(raised.value, Indeterminate)
        assert stream.next_offset(0) == 1
        assert stream.retention.records == 1000


@pytest.mark.parametrize(
    "error",
    [
        StorageError(errno.EMFILE, "injected", "x"),
        MemoryError(),
        millstream.LockTimeout("injected"),
    ],
)
def test_what_fails_behind_a_record_put_ack_or_commit_says_indeterminate(
    tmp_path, monkeypatch, error
):
    from millstream.groups.group import Group
    from millstream.queues.queue import Queue

    def fail(*_, **__):
        raise error

    store = millstream.open(tmp_path / "store", durability="sync")
    stream, queue = store.stream("s"), store.queue("q")
    stream.append(b"a")
    ids = queue.put_many([b"a", b"b", b"c", b"d"])
    messages = queue.get_many(4)
    consumer = stream.consumer(group="g")
    assert consumer.poll(10.0) is not None
    with monkeypatch.context() as patch:
        patch.setattr(PartitionLog, "_sync_owned", fail)
        patch.setattr(Queue, "_make_durable", fail)
        patch.setattr(Group, "_make_durable", fail)
        calls = [
            lambda: stream.append(b"b"), lambda: stream.append_many([b"c", b"d"]),
            lambda: stream.producer("p").append(b"e", sequence=0),
            lambda: queue.put(b"e"), lambda: queue.put_many([b"f", b"g"]),
            lambda: messages[0].ack(), lambda: messages[1].nack(), lambda: messages[2].reject(),
            lambda: queue.ack_many(messages[3:]), lambda: queue.dead.redrive(ids[2]),
            lambda: queue.cancel(ids[2]), lambda: consumer.commit(),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(Indeterminate) as raised:
                call()
            assert raised.value.__cause__ is error
    assert stream.next_offset(0) == 5
    assert [message.finished for message in messages] == ["ack", "nack", "dead", "ack"]
    assert len(queue) == 4
    assert consumer.group.lag() == 4
    with monkeypatch.context() as patch:  # of an append it says which record that is
        patch.setattr(PartitionLog, "_sync_owned", fail)
        with pytest.raises(Indeterminate) as raised:
            stream.append(b"h")
        assert [tuple(span) for span in raised.value.published] == [(0, 1, 5, 1)]
    # Nothing is poisoned: no sync had failed.
    stream.append(b"i")
    assert stream.durable_offset(0) == 7
    consumer.close()
    store.close()


@pytest.mark.parametrize("error", [MemoryError(), StorageError(errno.EMFILE, "injected", "x")])
def test_what_fails_behind_the_record_of_a_transaction_says_indeterminate(
    tmp_path, monkeypatch, error
):
    from millstream.transactions.applier import Applier

    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("s")
        with monkeypatch.context() as patch:
            patch.setattr(Applier, "apply", lambda *_, **__: (_ for _ in ()).throw(error))
            with pytest.raises(Indeterminate) as raised, store.transaction() as tx:
                tx.append(stream, b"a")
        assert raised.value.committed
        with store.transaction() as tx:
            tx.append(stream, b"b")
        assert [v for batch in stream.read() for v in batch.values] == [b"a", b"b"]


def test_a_store_that_is_closed_while_a_record_is_synced(tmp_path, monkeypatch):
    """What the sync of another thread covers is durable, whoever closed the store meanwhile."""
    begun, go_on = threading.Event(), threading.Event()
    real = files.sync

    def sync(descriptor, path):
        if path.endswith(".seg"):
            begun.set()
            assert go_on.wait(SECONDS)
        real(descriptor, path)

    store = millstream.open(tmp_path / "store", durability="sync")
    stream = store.stream("s")
    stream.append(b"a")
    monkeypatch.setattr(files, "sync", sync)
    found = []

    def append():
        try:
            found.append(stream.append(b"b").offset)
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=append), threading.Thread(target=store.close)]
    threads[0].start()
    assert begun.wait(SECONDS)
    threads[1].start()
    until(lambda: stream.closed or store.closed)
    go_on.set()
    for thread in threads:
        thread.join(SECONDS)
    assert found == [1]


def test_a_put_beside_the_closing_of_its_store_is_durable_or_says_so(tmp_path, monkeypatch):
    """The files that it would sync are closed by then."""
    store = millstream.open(tmp_path / "store", durability="sync")
    queue = store.queue("q")
    queue.put(b"a")
    real = type(queue)._make_durable

    def sync(self, *rest):
        store.close()  # as another thread may, between the put and its sync
        real(self, *rest)

    monkeypatch.setattr(type(queue), "_sync_at_close", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(type(queue), "_make_durable", sync)
        with pytest.raises(Indeterminate):
            queue.put(b"b")
    with millstream.open(tmp_path / "store") as store:
        assert len(store.queue("q")) == 2


# --- without descriptors --------------------------------------------------------------------------


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


EXHAUSTED = """
    import contextlib, os, resource, sys, tempfile, time, timing, warnings
    import millstream

    @contextlib.contextmanager
    def no_descriptors():
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        try:
            yield
        finally:
            for one in taken:
                os.close(one)

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
"""


def test_sync_needs_no_descriptor_that_it_did_not_have_before_it_stored_anything():
    out = run_python(
        EXHAUSTED
        + """
    with tempfile.TemporaryDirectory() as path:
        with millstream.open(path, durability="sync") as store:
            stream = store.stream("s", segment_bytes=1 << 16)
            for _ in range(8):
                stream.append(b"x" * 4000)
            native = stream._opened()[0].native
            timing.until(lambda: native.next is not None)  # the spare: it is half full
            stream.append(b"x")
            other = store.stream("t", durability="process")
            other.append(b"x")
            queue = store.queue("q")
            queue.put(b"x")
            stored = 0
            with no_descriptors():
                assert stream.append(b"y").offset == 9
                assert stream.durable_offset(0) == 10
                queue.put(b"y")
                queue.get(timeout=0).ack()
                # Never synced here: what it needs is asked for before the record is stored.
                try:
                    other.append(b"y", durability="sync")
                except millstream.StorageError as error:
                    assert not isinstance(error, millstream.Indeterminate), error
                    assert other.next_offset(0) == 1
                else:
                    assert other.durable_offset(0) == 2
                try:  # until a segment is full, and over the roll to the spare
                    for _ in range(100):
                        stream.append(b"z" * 4000)
                        stored += 1
                        assert stream.durable_offset(0) == stored + 10
                except millstream.StorageError as error:
                    assert not isinstance(error, millstream.Indeterminate), error
                assert stream.next_offset(0) == stored + 10, stored
            assert stored >= 15, stored
            stream.append(b"end")
            other.append(b"end", durability="sync")
            assert stream.durable_offset(0) == stored + 11
    print("ok")
    """
    )
    assert out == "ok\n"


@pytest.mark.parametrize("stored", ["process", "interval", "sync"])
def test_append_at_interval_is_synced_whatever_the_level_of_its_stream(tmp_path, stored):
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", partitions=1, durability=stored)
        for offset in range(2):
            stream.append(b"x", durability="interval")
            until(lambda n=offset + 1: stream.durable_offset(0) == n, seconds=SOON)
