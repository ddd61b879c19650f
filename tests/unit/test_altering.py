"""Settings that are deployed: opened with other ones than are stored, altered while in use."""

import subprocess
import sys
import textwrap
import threading

import pytest

import millstream
from millstream import Compaction, Retention, RetryPolicy
from millstream.testing import clock

WEEK, MONTH = Retention(age="7d"), Retention(age="30d")
TWICE = RetryPolicy(max_attempts=2, backoff=0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    with millstream.open(path, durability="process") as opened:
        yield opened


@pytest.fixture
def other(store):
    """The same store as another process has it: nothing is shared but the files."""
    with millstream.open(store.path) as opened:
        yield opened


def elsewhere(path, program, *words):
    """Run a program in a process of its own, `store` open; what it printed."""
    whole = "import sys, millstream\nwith millstream.open(sys.argv[1]) as store:\n"
    whole += textwrap.indent(textwrap.dedent(program), "    ")
    command = [sys.executable, "-W", "error", "-c", whole, str(path), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# --- opening with other settings ------------------------------------------------------------------

STREAM = [
    ("retention", WEEK, MONTH),
    ("segment_bytes", 1 << 20, 2 << 20),
    ("compact", Compaction(min_dirty=0.25), Compaction(min_dirty=0.75)),
    ("partitions", 2, 5),
]
STREAM_ATTRIBUTES = {"compact": "compaction"}
QUEUE = [
    ("capacity", 100, 300),
    ("lease", 5.0, 7.0),
    ("retry", RetryPolicy(), TWICE),
]


@pytest.mark.parametrize(("setting", "first", "second"), STREAM)
def test_a_stream_is_altered_kept_or_refused_as_its_opener_says(
    store, other, setting, first, second
):
    attribute = STREAM_ATTRIBUTES.get(setting, setting)
    stream = store.stream("s", **{setting: first})
    with pytest.raises(millstream.ConfigMismatch, match=f"'s' has {setting} .*on_mismatch="):
        other.stream("s", **{setting: second})
    kept = other.stream("s", on_mismatch="keep", **{setting: second})
    assert getattr(kept, attribute) == getattr(stream, attribute) == first
    altered = other.stream("s", on_mismatch="alter", **{setting: second})
    for handle in (altered, kept, stream, store.stream("s", **{setting: second})):
        assert getattr(handle, attribute) == second


@pytest.mark.parametrize(("setting", "first", "second"), QUEUE)
def test_a_queue_is_altered_kept_or_refused_as_its_opener_says(
    store, other, setting, first, second
):
    queue = store.queue("q", **{setting: first})
    with pytest.raises(millstream.ConfigMismatch, match=f"'q' has {setting} .*on_mismatch="):
        other.queue("q", **{setting: second})
    kept = other.queue("q", on_mismatch="keep", **{setting: second})
    assert getattr(kept, setting) == getattr(queue, setting) == first
    altered = other.queue("q", on_mismatch="alter", **{setting: second})
    for handle in (altered, kept, queue, store.queue("q", **{setting: second})):
        assert getattr(handle, setting) == second


FIXED = [
    ({"priorities": 3}, {"priorities": 4}),
    ({"slot_bytes": 512}, {"slot_bytes": 256}),
    ({"payload_bytes": 1 << 20}, {"payload_bytes": 2 << 20}),
    ({}, {"ordering": "key"}),
    ({"dead_limit": 5}, {"dead_limit": 6}),
    ({}, {"on_dead": "stop"}),
    ({"dedup_window": 60.0}, {"dedup_window": 0.0}),
    ({"capacity": 100}, {"capacity": 99}),
]


@pytest.mark.parametrize(("first", "second"), FIXED)
@pytest.mark.parametrize("on_mismatch", ["raise", "alter"])
def test_what_cannot_change_is_refused_and_nothing_else_is_altered(
    store, other, first, second, on_mismatch
):
    store.queue("q", retry=TWICE, **first)
    with pytest.raises(millstream.ConfigMismatch, match=f"has {next(iter(second))} "):
        other.queue("q", retry=RetryPolicy(), on_mismatch=on_mismatch, **second)
    assert store.queue("q").retry == TWICE
    other.queue("q", on_mismatch="keep", **second)  # as it is, then


def test_partitions_are_never_fewer(store, other):
    store.stream("s", partitions=3)
    for on_mismatch in ("raise", "alter"):
        with pytest.raises(millstream.ConfigMismatch, match="has 3"):
            other.stream("s", partitions=2, retention=WEEK, on_mismatch=on_mismatch)
    assert store.stream("s").retention == Retention()
    assert other.stream("s", partitions=2, on_mismatch="keep").partitions == 3


def test_a_worker_with_settings_is_deployed_beside_a_web_process_without(store, path):
    q = store.queue("mail")  # whoever comes first
    q.put(b"x")
    worker = """
        retry = millstream.RetryPolicy(max_attempts=1)
        q = store.queue("mail", retry=retry, lease=9.0, on_mismatch="alter")
        q.get(timeout=60).nack()
        print(len(q), len(q.dead.list()))
    """
    assert elsewhere(path, worker) == "0 1"
    assert (q.retry.max_attempts, q.lease) == (1, 9.0)
    assert elsewhere(path, worker.replace("q.get", "q.put(b'y'); q.get")) == "0 2"
    assert elsewhere(path, "print(store.queue('mail').retry.max_attempts)") == "1"


def test_durability_is_stored_when_it_is_to_be_altered(store, other):
    for make in (lambda one: one.stream, lambda one: one.queue):
        mine = make(store)("x", durability="process")
        assert make(other)("x", durability="sync").durability == "sync"  # of that handle alone
        assert mine.durability == "process"
        make(other)("x", durability="sync", on_mismatch="keep")
        assert mine.durability == "process"
        assert make(other)("x", durability="sync", on_mismatch="alter").durability == "sync"
        assert mine.durability == "sync"


@pytest.mark.parametrize("wrong", ["no", "", None, True, 5])
def test_on_mismatch_is_one_of_three(store, wrong):
    for make in (store.stream, store.queue):
        with pytest.raises(millstream.InvalidArgument, match="on_mismatch"):
            make("x", on_mismatch=wrong)
    assert store.streams() == store.queues() == []


def test_a_reader_alters_nothing(store, path):
    store.stream("s", retention=WEEK)
    store.queue("q", lease=5.0)
    with millstream.open(path, mode="r") as reader:
        assert reader.stream("s", retention=WEEK, on_mismatch="alter").retention == WEEK
        assert reader.queue("q", lease=6.0, on_mismatch="keep").lease == 5.0
        with pytest.raises(millstream.Unsupported, match="read-only"):
            reader.stream("s", retention=MONTH, on_mismatch="alter")
        with pytest.raises(millstream.Unsupported, match="read-only"):
            reader.queue("q", lease=6.0, on_mismatch="alter")


# --- who follows ----------------------------------------------------------------------------------


def test_every_setting_of_a_queue_holds_at_the_next_call_elsewhere(store, other):
    q, theirs = store.queue("q", ttl=60.0), other.queue("q")
    first = theirs.put(b"x" * 100)
    q.alter(
        lease=1000.0, retry=TWICE, ttl=None, durability="sync", payload_max=50, dedup_window=60.0,
        ageing=True,
    )  # fmt: skip
    with pytest.raises(millstream.LimitExceeded):
        theirs.put(b"x" * 51)
    assert theirs.put(b"1", dedup_id="one") == theirs.put(b"1", dedup_id="one") != first
    assert q.put(b"1", dedup_id="one") == theirs.put(b"2", dedup_id="one")
    assert [m.expires is None for m in theirs.peek(9)] == [False, True]
    for _ in range(2):
        for message in theirs.get_many(2, timeout=1):
            assert (message.deadline - message.put_at).total_seconds() > 900
            if message.id == first:
                message.nack(delay=0)
    assert [letter.id for letter in q.dead.list()] == [first]
    assert (theirs.lease, theirs.retry, theirs.durability) == (1000.0, TWICE, "sync")
    q._check()


def test_a_dedup_window_that_came_later_is_there_after_opening_again(path):
    with clock():
        with millstream.open(path) as store:
            q = store.queue("q")
            q.put(b"0")
            q.alter(dedup_window=60.0)
            number = q.put(b"1", dedup_id="one")
            with pytest.raises(millstream.InvalidArgument, match="dedup_window"):
                q.alter(dedup_window=0)
        with millstream.open(path) as store:
            q = store.queue("q")
            assert q.put(b"1", dedup_id="one") == number
            assert len(q) == 2
            q._check()
    assert not millstream.inspect.verify(path).problems


def test_an_append_follows_the_altered_level(store, other):
    stream, theirs = store.stream("s"), other.stream("s")
    theirs.append(b"1")
    stream.alter(durability="sync")
    theirs.append(b"2")  # nothing but the append
    assert stream.durable_offset(0) == 2


def test_a_reader_follows_what_is_altered(store, path):
    stream, q = store.stream("s"), store.queue("q", capacity=10, dead_limit=0)
    q.put(b"0")
    with millstream.open(path, mode="r") as reader:
        theirs, looked_at = reader.stream("s"), reader.queue("q")
        stream.alter(retention=WEEK)
        q.alter(lease=5.0)
        assert theirs.retention == WEEK
        assert (looked_at.lease, len(looked_at)) == (5.0, 1)


def test_a_reader_that_came_before_all_writers_follows_a_larger_capacity(path, tmp_path):
    copy = tmp_path / "copy"
    with millstream.open(path) as store:
        store.queue("q", capacity=10, dead_limit=0).put(b"x")
        store.backup(copy)  # which has no hints
    with millstream.open(copy, mode="r") as reader:
        looked_at = reader.queue("q")
        assert len(looked_at) == 1
        with millstream.open(copy) as store:
            q = store.queue("q", capacity=5000, on_mismatch="alter")
            assert len(q.put_many([b"x"] * 5000)) == 4999
            assert (len(looked_at), looked_at.capacity) == (5000, 5000)


def test_a_closed_or_dropped_handle_says_what_it_had(store):
    stream, q = store.stream("s", retention=WEEK), store.queue("q", lease=5.0)
    store.drop_stream("s")
    store.drop_queue("q")
    assert (stream.retention, q.lease, q.durability) == (WEEK, 5.0, "process")
    store.close()
    assert (stream.retention, q.lease, q.capacity) == (WEEK, 5.0, 100_000)


# --- at once, and killed --------------------------------------------------------------------------


def test_two_that_alter_at_once_lose_nothing_of_each_other(store, other):
    """Each names another setting: a read and a write without the word would lose one of them."""
    store.stream("s")
    store.queue("q")
    ends = threading.Barrier(2)

    def alter(one, fields):
        for _ in range(20):
            ends.wait(30)
            for make, key, values in fields:
                for value in values:
                    getattr(one, make)("s" if make == "stream" else "q", on_mismatch="alter",
                                       **{key: value})  # fmt: skip

    first = [("stream", "retention", (WEEK, MONTH)), ("queue", "lease", (5.0, 6.0))]
    second = [("stream", "segment_bytes", (1 << 20, 2 << 20)), ("queue", "retry", (TWICE,))]
    threads = [
        threading.Thread(target=alter, args=arguments)
        for arguments in ((store, first), (other, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for one in (store, other):
        stream, q = one.stream("s"), one.queue("q")
        assert (stream.retention, stream.segment_bytes) == (MONTH, 2 << 20)
        assert (q.lease, q.retry) == (6.0, TWICE)


def test_two_that_want_as_many_partitions_get_as_many(store, path):
    store.stream("s")
    program = "store.stream('s', partitions=7, on_mismatch='alter'); print('well')"
    command = [sys.executable, "-c", "import sys, millstream\n"
               f"with millstream.open(sys.argv[1]) as store: {program}", str(path)]  # fmt: skip
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [one.communicate(timeout=600)[0] for one in running] == ["well\n"] * 3
    assert store.stream("s").partitions == 7


KILLED = """
import os, sys, millstream
from millstream.disk import files
store = millstream.open(sys.argv[1])
stream, q = store.stream("s"), store.queue("q")
write = files.write_json
def killed(path, body):
    if sys.argv[3] == "after":
        write(path, body)
    os.kill(os.getpid(), 9)
files.write_json = killed
if sys.argv[2] == "stream":
    stream.alter(segment_bytes=1 << 20)
else:
    q.alter(lease=5.0)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["stream", "queue"])
def test_who_alters_and_is_killed_leaves_all_with_the_same_settings(store, other, what, when):
    handles = [(one.stream("s"), one.queue("q")) for one in (store, other)]
    for stream, q in handles:
        stream.append(b"x")
        q.put(b"x")
    command = [sys.executable, "-c", KILLED, store.path, what, when]
    assert subprocess.run(command).returncode == -9
    expected = {"before": (128 << 20, 30.0), "after": (1 << 20, 5.0)}[when]
    for stream, q in handles:
        stream.append(b"x")
        q.put(b"x")
        found = (stream.segment_bytes, q.lease)
        at = ("stream", "queue").index(what)
        assert found[at] == expected[at]
    for stream, q in handles:
        assert stream._config_number % 2 == 1
        assert stream._config_seen == stream._config_number
        assert q._config_seen == q._config_number
    handles[0][0].alter(retention=WEEK)
    handles[0][1].alter(lease=8.0)
    assert (handles[1][0].retention, handles[1][1].lease) == (WEEK, 8.0)
