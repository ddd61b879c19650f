"""The capacity of a queue is raised while others put, take and wait; or while they are killed."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest
from timing import until

import millstream
from millstream.disk import files
from millstream.queues import capacity, slots
from millstream.testing import clock


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def drained(q):
    found = []
    while messages := q.get_many(1000, timeout=0):
        found += [m.value for m in messages]
        assert q.ack_many(messages) == []
    return found


def test_who_waits_for_room_goes_on(store):
    q = store.queue("q", capacity=1)
    q.put(b"1")
    with millstream.open(store.path) as other:
        waiting = threading.Thread(target=other.queue("q").put, args=(b"2",))
        waiting.start()
        with pytest.raises(millstream.QueueFull):
            q.put(b"x", timeout=0.05)
        q.alter(capacity=3000)
        waiting.join(10)
        assert not waiting.is_alive()
        assert len(other.queue("q").put_many([b"x"] * 4000)) == 2998
        assert store.queue("q", capacity=3000).stats().capacity == 3000
        q._check()
        assert len(drained(q)) == 3000
    assert q._counts()["free"] >= 3000


def test_what_was_there_is_there_in_its_order(tmp_path):
    with clock() as virtual, millstream.open(tmp_path / "store") as store:
        q = store.queue("q", capacity=100, priorities=3)
        with millstream.open(store.path) as other:
            theirs = other.queue("q")
            for number in range(20):
                q.put(b"%d" % number, priority=2 - number % 3)
            q.put(b"later", delay=60)
            q.put(b"dead", priority=0)
            for m in theirs.get_many(100):
                if m.value == b"dead":
                    m.reject("no")
                else:
                    m.release()
            leased = theirs.get()
            q.alter(capacity=200)
            q._check()
            assert [letter.value for letter in theirs.dead.list()] == [b"dead"]
            leased.ack()
            assert len(q) == 20 + 1 - 1
            virtual.advance(31)
            found = drained(q)
            numbers = list(map(int, found))
            assert sorted(numbers) == sorted(set(range(20)) - {int(leased.value)})
            virtual.advance(30)
            assert drained(theirs) == [b"later"]
            q._check()


def test_order_of_keys_is_kept(store):
    q = store.queue("q", capacity=100, ordering="key")
    for number in range(60):
        q.put(b"%d" % number, key=b"%d" % (number % 4))
    with millstream.open(store.path) as other:
        theirs = other.queue("q")
        first = theirs.get_many(2)
        q.alter(capacity=500)
        for number in range(60, 300):
            theirs.put(b"%d" % number, key=b"%d" % (number % 4))
        assert theirs.ack_many(first) == []
        found = [int(m.value) for m in first] + [int(value) for value in drained(q)]
    assert sorted(found) == list(range(300))
    for key in range(4):
        of_key = [number for number in found if number % 4 == key]
        assert of_key == sorted(of_key)


def test_capacity_is_only_raised(store):
    q = store.queue("q", capacity=100)
    q.put(b"x")
    for few_or_many in (99, 1 << 24):
        with pytest.raises(millstream.InvalidArgument):
            q.alter(capacity=few_or_many)
    q.alter(capacity=100, lease=5)
    assert (q.capacity, q.lease) == (100, 5.0)
    q.alter(capacity=101, lease=6)
    assert (q.capacity, q.lease) == (101, 6.0)
    assert drained(q) == [b"x"]


def test_full_disk_changes_nothing(store, monkeypatch):
    q = store.queue("q", capacity=1)
    q.put(b"x")
    real = files.allocate

    def allocate(descriptor, length, path):
        if "hints" in path:
            raise millstream.StoreFull(28, "no space", path)
        real(descriptor, length, path)

    monkeypatch.setattr(files, "allocate", allocate)
    with pytest.raises(millstream.StoreFull):
        q.alter(capacity=1000)
    with pytest.raises(millstream.QueueFull):
        q.put(b"y", timeout=0)
    monkeypatch.undo()
    q.alter(capacity=1000)
    q.put(b"y", timeout=0)
    assert drained(q) == [b"x", b"y"]


KILLED = """
import os, sys
import millstream
from millstream.queues import slots
slots.Files.publish_hints = lambda *_: os._exit(9)
millstream.open(sys.argv[1], durability="process").queue("q").alter(capacity=30)
"""


def test_disk_that_is_full_at_the_last_step_changes_nothing(store, monkeypatch):
    q = store.queue("q", capacity=1)
    q.put(b"x")
    there = sorted(os.listdir(q.path))

    def full(path, body):
        raise millstream.StoreFull(28, "no space", path)

    with millstream.open(store.path) as other, monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        with pytest.raises(millstream.StoreFull):
            q.alter(capacity=1000)
        for handle in (q, other.queue("q")):
            assert handle.capacity == 1
            with pytest.raises(millstream.QueueFull):
                handle.put(b"y", timeout=0)
        assert sorted(os.listdir(q.path)) == there
    q.alter(capacity=1000)
    q.put(b"y", timeout=0)
    q._check()
    assert drained(q) == [b"x", b"y"]


FULL = """
import os, sys
import millstream
from millstream.queues import slots
def full(self, temporary):
    raise millstream.StoreFull(28, "no space", temporary)
q = millstream.open(sys.argv[1], durability="process").queue("q")
slots.Files.publish_hints = full
try:
    q.put(b"y")
except millstream.StoreFull:
    os._exit(0)
"""


def test_raising_that_was_cut_short_is_taken_up_again_once_there_is_room(store):
    q = store.queue("q", capacity=20)
    q.put(b"x")
    there = sorted(os.listdir(q.path))
    assert subprocess.run([sys.executable, "-c", KILLED, store.path], check=False).returncode == 9

    command = [sys.executable, "-c", FULL, store.path]
    assert subprocess.run(command, check=False).returncode == 0
    q.put(b"y")
    assert q.capacity == 30
    q._check()
    assert drained(q) == [b"x", b"y"]
    assert sorted(os.listdir(q.path)) == there


@pytest.mark.parametrize("ordering", [None, "key"])
def test_raising_that_the_disk_refuses_is_taken_up_by_the_same_process(
    store, monkeypatch, ordering
):
    q = store.queue("q", capacity=20, ordering=ordering)
    q.put(b"x", key=b"k")

    def full(self, temporary):
        raise millstream.StoreFull(28, "no space", temporary)

    with millstream.open(store.path) as other, monkeypatch.context() as patch:
        theirs = other.queue("q")
        patch.setattr(slots.Files, "publish_hints", full)
        for call in (lambda: q.alter(capacity=30), lambda: q.put(b"y"), theirs.peek):
            with pytest.raises(millstream.StoreFull):
                call()
        patch.undo()
        theirs.put(b"y", key=b"k")
        assert theirs.capacity == 30
    assert drained(q) == [b"x", b"y"]
    q._check()


def test_reader_waits_for_a_raise_that_was_cut_short_as_long_as_for_a_lock(store, monkeypatch):
    q = store.queue("q", capacity=20)
    q.put(b"x")
    with millstream.open(store.path, mode="r") as reader:
        theirs = reader.queue("q")
        assert len(theirs) == 1
        command = [sys.executable, "-c", KILLED, store.path]
        assert subprocess.run(command, check=False).returncode == 9
        with monkeypatch.context() as patch:
            patch.setattr(capacity, "LOCK_SECONDS", 0.05)
            with pytest.raises(millstream.LockTimeout, match="capacity is being raised"):
                theirs.peek()
        q.put(b"y")  # whoever may write takes it up
        assert [m.value for m in theirs.peek(9)] == [b"x", b"y"]
        assert theirs.capacity == 30


@pytest.mark.parametrize("killed", [False, True])
def test_who_is_two_behind_leaves_the_last_one_alone(store, monkeypatch, killed):
    q = store.queue("q", capacity=10, ordering="key")
    with millstream.open(store.path) as second, millstream.open(store.path) as third:
        altering, behind = second.queue("q"), third.queue("q")
        q.put_many([millstream.Put(b"1", key=b"k"), millstream.Put(b"2", key=b"k")])
        q.alter(capacity=20)
        held = altering.get()
        late = threading.Thread(target=behind.put, args=(b"3",), kwargs={"key": b"k"})
        publish, made = slots.Files.publish_hints, []

        def publishing(self, temporary):
            made.append(temporary)
            if not killed and len(made) == 1:
                late.start()  # while these are not there yet
                late.join(0.2)
            publish(self, temporary)

        monkeypatch.setattr(slots.Files, "publish_hints", publishing)
        if killed:
            command = [sys.executable, "-c", KILLED, store.path]
            assert subprocess.run(command, check=False).returncode == 9
            late.start()
        else:
            altering.alter(capacity=30)
        late.join(60)  # ThreadSanitizer needs 16 s to give back the words of the killed one
        assert not late.is_alive()
        assert len(made) == 1
        assert [each.stats().capacity for each in (q, altering, behind)] == [30] * 3
        held.ack()
        assert drained(q) == [b"2", b"3"]
        q._check()


ALTERER = """
import os, sys
import millstream
from millstream.disk import files
from millstream.queues import slots
store = millstream.open(sys.argv[1], durability="process")
q = store.queue("q")
names = [name for name in ("allocate", "extend", "sync", "write", "rename", "replace",
         "write_json", "map_file", "remove", "open_file", "read_json") if hasattr(files, name)]
left = int(sys.argv[2])
def killing(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*arguments, **options)
    return call
for name in names:
    setattr(files, name, killing(getattr(files, name)))
q.alter(capacity=2000)
os._exit(0)
"""


@pytest.mark.parametrize("ordering", [None, "key"])
def test_killed_before_any_file_operation_it_is_as_before_or_raised(tmp_path, ordering):
    killed = 0
    for step in range(100):
        with millstream.open(tmp_path / f"{step}", durability="process") as store:
            q = store.queue("q", capacity=10, ordering=ordering, payload_bytes=0)
            q.put_many([millstream.Put(b"%d" % number, key=b"k") for number in range(8)])
            q.put(b"8", key=b"l", delay=0.01)
            command = [sys.executable, "-c", ALTERER, store.path, str(step)]
            ended = subprocess.run(command, check=False).returncode
            assert ended in (0, 9)
            killed += ended == 9
            with millstream.open(store.path) as other:  # one who joins now
                joined = other.queue("q")
                assert len(joined) == 9
                count = len(joined.put_many([millstream.Put(b"x", key=b"k")] * 3000))
                assert count in (1, 1991)
                assert ended == 9 or count == 1991
                q._check()
                until(lambda q=q, count=count: len(q) == 9 + count)
                found = []
                while messages := q.get_many(1000, timeout=0.1 if len(q) else 0):
                    found += [m.value for m in messages]
                    joined.ack_many(messages)
                assert sorted(found[: len(found)]) == sorted(
                    [b"%d" % number for number in range(9)] + [b"x"] * count
                )
                q.alter(capacity=3000)
                assert len(joined.put_many([b"x"] * 4000)) == 3000
        with millstream.open(tmp_path / f"{step}") as store:
            assert len(store.queue("q")) == 3000
        if ended == 0:
            break
    print(f"killed before {killed} file operations")
    assert killed > 5
    assert ended == 0


WORKER = """
import os, sys
import millstream
with millstream.open(sys.argv[1], durability="process") as store:
    q = store.queue("q")
    if sys.argv[2] == "put":
        for number in range(int(sys.argv[3]), int(sys.argv[3]) + 4000):
            q.put(b"%d" % number, key=b"%d" % (number % 7), delay=0.001 if number % 50 == 0 else 0)
    else:
        while True:
            with q.get(timeout=30) as m:
                value = m.value
            os.write(1, value + b"\\n")
            if value == b"end":
                break
"""


@pytest.mark.parametrize("ordering", [None, "key"])
def test_raised_again_and_again_under_traffic_nothing_is_lost(store, ordering):
    q = store.queue("q", capacity=10, ordering=ordering)
    command = [sys.executable, "-c", WORKER, store.path]
    consumers = [subprocess.Popen([*command, "get"], stdout=subprocess.PIPE) for _ in range(2)]
    producers = [subprocess.Popen([*command, "put", str(4000 * i)]) for i in range(2)]
    capacity = 10
    while any(process.poll() is None for process in producers):
        capacity += 10
        q.alter(capacity=capacity)
        time.sleep(0.02)  # raised in the middle of the traffic, not all before it
    assert all(process.returncode == 0 for process in producers)
    q.join(timeout=30)
    q.put_many([b"end"] * 2)
    outputs = [process.communicate(timeout=600)[0].split() for process in consumers]
    found = sorted(int(value) for output in outputs for value in output if value != b"end")
    print(f"raised {capacity // 10 - 1} times, {len(found)} messages")
    assert found == list(range(8000))
    q._check()
    assert len(os.listdir(q.path)) == 4  # no temporary file is left


EXCHANGE = """
import sys
import millstream
with millstream.open(sys.argv[1], durability="process") as store:
    q = store.queue("q")
    for number in range(int(sys.argv[3])):
        if sys.argv[2] == "put":
            q.put(b"", key=b"%d" % (number % 7), timeout=60)
        elif sys.argv[2] == "get":
            q.get(timeout=60).ack()
"""


def test_slot_that_is_free_again_at_once_does_not_break_the_order_of_its_former_key(store):
    """Full all the time: who puts takes the slot of another key while that key's next is found."""
    count = 20_000
    q = store.queue("q", capacity=4, ordering="key")
    command = [sys.executable, "-c", EXCHANGE, store.path]
    processes = [
        subprocess.Popen([*command, what, str(count)]) for what in ("put", "put", "get", "get")
    ]
    assert [process.wait(300) for process in processes] == [0] * 4
    print(f"{2 * count} messages")
    assert len(q) == 0
    q._check()


# --- what is dropped beside it --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rw", "r"])
def test_who_was_behind_when_it_was_dropped_says_so_and_uses_the_next_of_the_name(store, mode):
    """Such a handle was kept for ever, and looked for the files of the dropped one."""
    store.queue("q", capacity=1).put(b"1")
    with millstream.open(store.path, mode=mode) as behind:
        q = behind.queue("q")
        assert len(q) == 1
        store.queue("q").alter(capacity=3000)
        store.drop_queue("q")
        for call in (lambda: len(q), q.stats, lambda: q.put(b"x") if mode == "rw" else q.peek()):
            with pytest.raises(millstream.Closed, match="dropped"):
                call()
        with pytest.raises(millstream.NotFound):
            behind.queue("q", create=False)
        store.queue("q", capacity=2).put(b"2")
        assert [m.value for m in behind.queue("q").peek()] == [b"2"]


def test_drop_by_who_is_behind_is_seen_by_all(store):
    """It marked the hints that nobody used any more: what was put from then on was gone."""
    store.queue("q", capacity=1).put(b"1")
    with millstream.open(store.path) as other:
        q = other.queue("q")
        q.alter(capacity=3000)
        q.put(b"2")
        store.drop_queue("q")
        with pytest.raises(millstream.Closed, match="dropped"):
            q.put(b"3")


def test_drop_waits_for_a_raise_that_is_under_way(store, monkeypatch):
    """It would be undone where the new hints come."""
    q = store.queue("q", capacity=1)
    q.put(b"1")
    dropping = []

    def drop_meanwhile(self, temporary):
        if not dropping:
            dropping.append(threading.Thread(target=other.drop_queue, args=("q",)))
            dropping[0].start()
            dropping[0].join(0.05)  # it waits for the word by then; if not, this shows less
        publish(self, temporary)

    publish = slots.Files.publish_hints
    with millstream.open(store.path) as other:
        assert len(other.queue("q")) == 1
        monkeypatch.setattr(slots.Files, "publish_hints", drop_meanwhile)
        with contextlib.suppress(millstream.Closed):  # dropped at once
            q.alter(capacity=3000)
        dropping[0].join()
        with pytest.raises(millstream.Closed, match="dropped"):
            q.put(b"2")
        assert store.queues() == []


def test_raises_keep_no_descriptors(store):
    q = store.queue("q", capacity=10, dedup_window=60.0, payload_max=1 << 20)
    q.put(b"first", dedup_id="a")

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for more in (20, 40, 80):
        q.alter(capacity=more)
        q.put(b"x" * 100_000)
    assert descriptors() == before
    assert len(q) == 4
    q.flush()  # by the descriptors of before
