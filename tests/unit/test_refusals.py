"""What is refused: the error says what was wrong and what was expected, and nothing is stored."""

import errno
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import millstream
from millstream import (
    CorruptBatch,
    Indeterminate,
    InvalidArgument,
    InvalidType,
    LimitExceeded,
    LockTimeout,
    StorageError,
    Unsupported,
    _native,
)

HEADERS = {str(number): b"" for number in range(1025)}
OBJECTS = np.zeros(2, [("number", "i4"), ("object", "O")])
ROWS = np.zeros((3, 8), "u1")[:, ::2]

APPENDS = [
    (lambda s: s.append_many(np.array(5)), InvalidType, "value: an array without dimensions"),
    (lambda s: s.append_many(np.array(["a"])), InvalidType, "array of str; encode it first"),
    (lambda s: s.append_many(OBJECTS), InvalidType, "value: elements of .* hold Python objects"),
    (lambda s: s.append_many(ROWS), InvalidType, "value: the rows of the array are not contiguous"),
    (lambda s: s.append_many([b"v"] * 3, keys=ROWS), InvalidType, "key: the rows of the array"),
    (lambda s: s.append_many(b"one"), InvalidType, "found one bytes; append.. takes a single"),
    (lambda s: s.append_many(5), InvalidType, "expected a list, NumPy or Arrow array, found int"),
    (lambda s: s.append_many([b"v"], keys=[]), InvalidArgument, "0 keys for 1 values"),
    (lambda s: s.append_many([b"v"], headers=5), InvalidType, "sequence of mappings, found int"),
    (lambda s: s.append_many([b"v"], headers=[]), InvalidArgument, "0 headers for 1 values"),
    (lambda s: s.append_many([b"v"], headers=[5]), InvalidType, "of element 0: .* found int"),
    (lambda s: s.append(b"v", headers={"h": 5}), InvalidType, "'h' of element 0: .* found int"),
    (lambda s: s.append(b"v", headers=HEADERS), LimitExceeded, "1025 headers, the limit is 1024"),
    (lambda s: s.append(b"v", durability="soon"), InvalidArgument, "'soon': expected one of proc"),
    (lambda s: s.append(b"v", key=bytes(65537)), LimitExceeded, "key of element 0: 65537 bytes"),
    (lambda s: s.partition_for("k"), InvalidType, "key: expected bytes-like, found str"),
    (lambda s: s.append_arrow(s, value=5), InvalidType, "column 5: expected a name, or None"),
    (lambda s: s.append_arrow(s), InvalidType, "Stream is no Arrow data"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), APPENDS, ids=[row[2] for row in APPENDS])
def test_append_says_what_it_does_not_take(stream, call, error, text):
    with pytest.raises(error, match=text):
        call(stream)
    assert stream.next_offset(0) == 0


PUTS = [
    ({"headers": HEADERS}, LimitExceeded, "1025 headers, the limit is 1024"),
    ({"headers": {"h": bytes((1 << 20) + 1)}}, LimitExceeded, "'h': its value is longer than 1 Mi"),
    ({"headers": {"h" * 256: b""}}, LimitExceeded, "its name is longer than 255 bytes"),
    ({"headers": 5}, InvalidType, "headers: expected a mapping, found int"),
    ({"priority": 4}, InvalidArgument, "priority 4: the queue has priorities 0 to 3"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), PUTS, ids=[row[2] for row in PUTS])
def test_put_says_what_it_does_not_take(store, arguments, error, text):
    queue = store.queue("q", priorities=4)
    with pytest.raises(error, match=text):
        queue.put(b"v", **arguments)
    with pytest.raises(error, match=text):
        queue.put_many([millstream.Put(b"v", **arguments)])
    assert len(queue) == 0


@pytest.mark.parametrize("lease", [0, 31 * 86400])
def test_lease_of_no_time_or_of_a_month_is_none(queue, lease):
    queue.put(b"v")
    with queue.get(timeout=1) as message:
        with pytest.raises(InvalidArgument, match="lease .*: expected from 1 ms to 30 days"):
            message.extend(lease)
        assert not message.lost


def test_producer_says_what_it_does_not_take(stream):
    with stream.producer(id="p") as producer:
        with pytest.raises(LimitExceeded, match="key of element 0: 65537 bytes"):
            producer.append(b"v", sequence=0, key=bytes(65537))
        assert producer.last_sequence == -1
    assert stream.next_offset(0) == 0


def test_batch_says_what_it_cannot_give(stream):
    stream.append_many([b"a", b"b"], headers={"h": b""})
    [batch] = stream.read()
    for call, error, text in (
        (lambda: batch.values[2], IndexError, "index 2 of a column of 2"),
        (lambda: batch.values.view(-3), IndexError, "of a column of 2"),
        (lambda: batch.headers[2], IndexError, "index 2 of a batch of 2"),
        (lambda: batch.values_as("no such type"), InvalidType, r"values_as\('no such type'\)"),
        (lambda: batch.values_as("S2"), InvalidArgument, "are not all 2 bytes long"),
        (lambda: batch[0], TypeError, "cut by slices; its columns are indexed"),
        (lambda: batch[::2], InvalidArgument, "expected a slice of at least one record and step 1"),
        (lambda: batch[2:], InvalidArgument, "expected a slice of at least one record and step 1"),
        (lambda: batch.arrow(["nope"]), InvalidArgument, "no Arrow column 'nope'; there are part"),
    ):
        with pytest.raises(error, match=text):
            call()


class Taken:
    """Arrow data that gives the same capsules again."""

    def __init__(self, data, method):
        capsules = getattr(data, method)()
        setattr(self, method, lambda: capsules)


@pytest.mark.parametrize("method", ["__arrow_c_stream__", "__arrow_c_array__"])
def test_arrow_data_are_taken_once(store, method):
    first, second = store.stream("first"), store.stream("second")
    first.append_many([b"a", b"b"])
    [batch] = first.read()
    data = Taken(batch, method)
    second.append_arrow(data)
    with pytest.raises(InvalidArgument, match="the Arrow (stream|data) was consumed before"):
        second.append_arrow(data)
    with pytest.raises(InvalidArgument, match="value= must name the column of values"):
        second.append_arrow(batch, value=None)
    assert second.next_offset(0) == 2


def test_what_only_reads_is_changed_by_nothing(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        store.stream("s").append(b"v")
        store.queue("q").put(b"v")
    with millstream.open(tmp_path / "store", mode="r") as store:
        stream, queue = store.stream("s"), store.queue("q")
        for call in (lambda: stream.append(b"v"), lambda: queue.put(b"v"), queue.purge):
            with pytest.raises(Unsupported, match="read-only"):
                call()
        with pytest.raises(Unsupported, match="read-only"):
            queue._begin_ids(1 << 60)  # what others ask before, it asks as well
        assert (stream.next_offset(0), len(queue)) == (1, 1)


def test_position_that_a_transaction_has_is_not_committed_beside_it(stream):
    stream.append(b"v")
    with stream.consumer(group="g") as consumer:
        batch = consumer.poll()
        consumer._member.prepare(99)
        for call in (lambda: consumer.commit(batch), consumer.commit):
            with pytest.raises(InvalidArgument, match="a transaction has the position of partiti"):
                call()
        consumer.group._revert(0, 99)
        consumer.commit(batch)
        assert consumer.committed[0].offset == 1


def test_table_of_a_view_says_where_what_was_kept_does_not_agree():
    for parts, text in (
        ((bytes(8), bytes(8), b"", b"", b""), "as many keys as values and origins"),
        (((9).to_bytes(8, "little"), bytes(8), b"k", b"", b"\0"), "ends that fall"),
        ((bytes(8), bytes(8), b"", b"", b"\xff"), "an origin of 255"),
    ):
        table = _native.Latest()
        with pytest.raises(ValueError, match=text):
            table._load(*parts)
        assert len(table) == 0


def test_time_in_a_damaged_batch_is_not_found_silently(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        for number in range(3):
            store.stream("s").append(b"value %d" % number, timestamp=number)
    [path] = [path for path in (tmp_path / "store/streams/s").rglob("*")
              if path.is_file() and b"value 0" in path.read_bytes()]  # fmt: skip
    damaged = path.read_bytes().replace(b"value 0", b"value X")
    path.write_bytes(damaged)
    with (
        millstream.open(tmp_path / "store", mode="r") as store,
        pytest.raises(CorruptBatch, match="nothing was changed, see `millstream verify`"),
    ):
        store.stream("s").offset_at(2, 0)
    assert path.read_bytes() == damaged


# --- what comes behind ----------------------------------------------------------------------------


def failing(*_):
    raise StorageError(errno.EIO, "injected")


def test_what_fails_behind_a_change_says_that_it_is_stored(store, monkeypatch):
    stream, queue = store.stream("s"), store.queue("q")
    stream.append(b"v")
    with stream.consumer(group="g") as consumer:
        batch, group = consumer.poll(), consumer.group
        with monkeypatch.context() as patch:
            patch.setattr(type(queue), "_changed", failing)
            patch.setattr(type(group), "_changed", failing)
            with pytest.raises(Indeterminate, match="it is stored, but whether it survives"):
                queue.put(b"v")
            with pytest.raises(Indeterminate, match="the position is stored, but whether"):
                consumer.commit(batch)
        assert (len(queue), consumer.committed[0].offset) == (1, 1)
        queue.put(b"v")


def test_what_fails_behind_an_append_is_for_the_next_one_to_say(stream, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(stream), "_after_append", failing)
        assert stream.append(b"v", durability="process").offset == 0  # which is all it promises
    assert stream.next_offset(0) == 1


# --- what the system refuses ----------------------------------------------------------------------


def test_system_calls_that_fail_say_why():
    for call in (
        lambda: _native.file_system_magic(-1),
        lambda: _native.unlock_byte(-1, 0),
        lambda: _native.unshare(-1),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_store_whose_descriptors_cannot_be_kept_from_forks_is_not_opened(tmp_path):
    millstream.open(tmp_path / "store").close()
    guarded = 1 << 20  # no descriptors of ours: nobody has so many
    try:
        with pytest.raises(OSError, match="too many guarded"):
            while guarded < (1 << 20) + 10000:
                _native.fork_guard(guarded)
                guarded += 1
        before = len(os.listdir("/proc/self/fd"))
        for mode in ("rw", "r"):
            with pytest.raises(StorageError, match="open fewer stores"):
                millstream.open(tmp_path / "store", mode=mode)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        for number in range(1 << 20, guarded):
            _native.fork_release(number)
    with millstream.open(tmp_path / "store") as store:
        store.stream("s").append(b"v")


def test_shared_object_that_cannot_be_loaded_is_an_error_of_the_store():
    code = """
        import importlib.abc, sys
        import millstream

        class Refusing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "numpy":
                    raise ImportError("libnumpy.so: cannot open shared object file", name=name)

        with millstream.temporary() as store:
            store.stream("s").append(b"v")
            [batch] = store.stream("s").read()
            sys.meta_path.insert(0, Refusing())
            try:
                batch.offsets
            except millstream.StorageError as error:
                print(error)
            del sys.meta_path[0]
            assert list(batch.offsets) == [0]
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True,
                           text=True, check=True)  # fmt: skip
    assert "importing it failed: libnumpy.so: cannot open shared object file" in ended.stdout


ALLOCATIONS = """
    import contextlib
    import itertools

    import _testcapi
    import millstream

    KEYS = [b"1", b"2", b"3", b"4"]
    numbers = itertools.count(1)

    def refused(name, make, step=1):
        # Each allocation of the call, once: nothing is stored, or the error says so.
        after, fine = 0, 0
        while fine < 3:
            stream, call = make()
            before = stream.stats().records
            try:
                _testcapi.set_nomemory(after, after + 1)
                try:
                    call()
                finally:
                    _testcapi.remove_mem_hooks()
            except millstream.Indeterminate:
                fine = 0
            except (MemoryError, SystemError, RuntimeError, millstream.StorageError) as error:
                fine = 0
                assert stream.stats().records == before, (name, after, error)
            else:
                fine += 1
            after += step

    with millstream.temporary(durability="process") as store:
        stream = store.stream("s", partitions=4)
        stream.append_many(KEYS, keys=KEYS)
        [batch, *_] = stream.read()
        producer = stream.producer(id="p")
        queue = store.queue("q", capacity=10000)

        def new_stream():
            made = store.stream(f"new{next(numbers)}")
            producer = made.producer(id="p")
            return made, lambda: producer.append(b"v", sequence=1)

        def new_consumer():
            consumer = stream.consumer(group=f"g{next(numbers)}", timeout=0)
            return stream, lambda: consumer.poll(0)

        reader = stream.consumer(group="g", timeout=0)
        reader.poll(0)

        def of_a_transaction():
            for partition in range(4):
                reader.group._revert(partition, 99)
            return stream, lambda: reader._member.prepare(99)

        refused("append_many", lambda: (stream, lambda: stream.append_many(
            [bytearray(b"v")] * 4, keys=KEYS, headers={"h": b"v"})))
        refused("producer", lambda: (stream, lambda: producer.append_many(
            KEYS, first_sequence=4 * next(numbers), keys=KEYS)))
        refused("new producer", new_stream)
        refused("consumer", new_consumer, 3)
        refused("arrow", lambda: (stream, batch.arrow().__arrow_c_array__))
        refused("append_arrow", lambda: (stream, lambda: stream.append_arrow(batch)))
        refused("put", lambda: (stream, lambda: queue.put(b"v")))
        refused("put_many", lambda: (stream, lambda: queue.put_many([b"v"] * 2)))
        refused("headers", lambda: (stream, lambda: queue.put_many(
            [millstream.Put(b"v", headers={"h": b"v"})])))
        refused("prepare", of_a_transaction)
        with contextlib.suppress(ImportError):
            import pyarrow
            two = pyarrow.chunked_array([[b"a"], [b"b"]])
            refused("two chunks", lambda: (stream, lambda: stream.append_arrow(two)))
        queue._check()
"""


def test_no_memory_in_the_middle_of_a_call():
    pytest.importorskip("_testcapi")
    # Without what counts lines in children, which needs memory itself.
    env = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    if os.path.isdir("/dev/shm"):  # where a sync costs nothing
        env["TMPDIR"] = "/dev/shm"
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALLOCATIONS)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


# --- short words that a living process has --------------------------------------------------------

WORDS = {row[:2]: row[2] for row in _native.format_fields()}
BUCKETS, BUCKET_BYTES = 65536, 16


def write_word(path, at, word):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(word.to_bytes(4, "little"))


def hold_buckets(queue, word):
    """They are the last in the file, and begin with their words."""
    hints = np.memmap(queue.path / "hints", "<u4", "r+")
    hints[-BUCKETS * BUCKET_BYTES // 4 :: BUCKET_BYTES // 4] = word


def after_half_a_minute(now, call):
    """What a call raises while time passes quickly."""
    ended = threading.Event()

    def pass_time():
        while not ended.wait(0.01):
            now.advance(5)

    passing = threading.Thread(target=pass_time)
    passing.start()
    try:
        with pytest.raises(LockTimeout, match=f"held by process {os.getpid()} .member 1."):
            call()
    finally:
        ended.set()
        passing.join()


@pytest.fixture
def held(now, tmp_path):
    """A store, and the owner word of another living member."""
    with (
        millstream.open(tmp_path / "store", durability="process") as store,
        millstream.open(tmp_path / "store", durability="process") as other,
    ):
        yield store, other.session.members.word


def test_put_gives_up_after_half_a_minute_and_names_the_holder(now, held):
    store, word = held
    queue = store.queue("q", ordering="key")
    queue.put(b"first", key=b"k")
    hold_buckets(queue, word)
    after_half_a_minute(now, lambda: queue.put(b"second", key=b"k"))
    hold_buckets(queue, 0)
    assert len(queue) == 1
    queue.put(b"third", key=b"k")
    assert [message.value for message in queue.get_many(3, timeout=0)] == [b"first"]
    queue._check()


def test_raising_the_capacity_gives_up_and_gives_back_what_it_took(now, held):
    store, word = held
    queue = store.queue("q", ordering="key", capacity=100)
    queue.put(b"first", key=b"k")
    hold_buckets(queue, word)
    after_half_a_minute(now, lambda: queue.alter(capacity=200))
    hold_buckets(queue, 0)
    queue.put(b"second", key=b"k")
    queue.alter(capacity=300)
    assert queue.capacity == 300
    for expected in (b"first", b"second"):
        with queue.get(timeout=0) as message:
            assert message.value == expected
    queue._check()


def test_commit_gives_up_after_half_a_minute_and_names_the_holder(now, held):
    store, word = held
    stream = store.stream("s")
    stream.append_many([b"a", b"b"])
    with stream.consumer(group="g") as consumer:
        batch = consumer.poll()
        at = WORDS["ms_group_header", "word"]
        write_word(consumer.group.path, at, word)
        after_half_a_minute(now, lambda: consumer.commit(batch))
        write_word(consumer.group.path, at, 0)
        assert consumer.committed == {0: None}
        consumer.commit(batch)
        assert consumer.committed[0].offset == 2


def test_check_of_a_group_says_what_is_damaged(store):
    stream = store.stream("s")
    stream.append(b"v")
    with stream.consumer(group="g") as consumer:
        consumer.poll()
        group = consumer.group
        group._check()
        at = WORDS["ms_group_header", "word"]
        write_word(group.path, at, store.session.members.word)
        with pytest.raises(AssertionError, match="word"):
            group._check()
        write_word(group.path, at, 0)
        group._check()
