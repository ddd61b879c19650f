"""Nothing that is relative, or has an age, is changed by setting the wall clock; `at` follows it.

The wall clock is set for processes of their own by a preloaded `clock_gettime`, which reads how far
it is ahead from a file, or within this one by the virtual clock.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

import millstream
from millstream import _native
from millstream.disk import files
from millstream.testing import clock

HOUR, DAY = 3600.0, 86400.0
TO_1970 = -56 * 365.25 * DAY
FRAME = """
import sys
import time
import millstream

path, ask = sys.argv[1], input

def get(queue, timeout):
    try:
        with queue.get(timeout=timeout) as m:
            return m.value.decode()
    except millstream.Empty:
        return "nothing"
"""


class Machine:
    """Processes whose clocks can be set."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self.shim = directory / "wall_clock.so"
        self.ahead = directory / "ahead"
        self.set()
        source = Path(__file__).with_name("wall_clock.c")
        compiler = os.environ.get("CC", "cc").split()
        command = [*compiler, "-O1", "-shared", "-fPIC", "-o", self.shim, source, "-ldl"]
        subprocess.run(command, check=True, capture_output=True)

    def set(self, wall: float = 0.0, passed: float = 0.0) -> None:
        """Set how many seconds the wall clock is ahead, and how many more all clocks are."""
        numbers = struct.pack("<qq", round(wall * 1e9), round(passed * 1e9))
        descriptor = os.open(self.ahead, os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, numbers, 0)
        os.close(descriptor)

    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to have these clocks."""
        before = os.environ.get("LD_PRELOAD", "")  # a sanitizer, which must come first
        return {"LD_PRELOAD": f"{before} {self.shim}".strip(), "WALL_CLOCK": str(self.ahead)}

    @contextlib.contextmanager
    def process(self, code: str):
        """A process that runs the code; it prints, and reads a line where it calls `ask`."""
        with subprocess.Popen(
            [sys.executable, "-c", FRAME + code, self.store],
            env={**os.environ, **self.variables()},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            try:
                yield child
                assert child.stdin is not None
                child.stdin.close()
                assert child.wait(60) == 0
            finally:
                child.kill()

    def run(self, code: str) -> str:
        with self.process(code) as child:
            return child.stdout.read().strip()


def say(child) -> None:
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_process_whose_clocks_are_ahead_waits_no_longer(machine):
    """Else one that finds the gate taken at its exit, for a millisecond, seems to hang there."""
    machine.set(passed=2 * HOUR)
    code = """
import os
from millstream.disk import files
holder, waiter = (os.open(path + ".lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
files.lock(holder, 0, path, timeout=1)
try:
    files.lock(waiter, 0, path, timeout=0.01)
except millstream.LockTimeout:
    print("awake")
"""
    assert machine.run(code) == "awake"


# --- delays, and times of the wall clock, with real processes -------------------------------------


OPEN_QUEUE = 'q = millstream.open(path, durability="process").queue("q", ordering={!r})\n'


@pytest.mark.parametrize("ordering", [None, "key"])
@pytest.mark.parametrize("wall", [-5 * HOUR, 400 * DAY, TO_1970])
def test_a_delay_lasts_as_long_however_the_clock_is_set(machine, ordering, wall):
    code = OPEN_QUEUE.format(ordering) + (
        'for i in range(2): q.put(b"%d" % i, key=b"k", delay=0.5)\n'
        'print("put", flush=True); ask(); begun = time.monotonic()\n'
        "print(get(q, 30), get(q, 30)); print(time.monotonic() - begun < 10)\n"
    )
    with machine.process(code) as child:
        assert child.stdout.readline() == "put\n"
        machine.set(wall)
        say(child)
        assert child.stdout.read().split() == ["0", "1", "True"]


@pytest.mark.parametrize("set_to", [(0.0, -5 * HOUR), (400 * DAY, 0.0), (0.0, 400 * DAY)])
def test_a_delay_lasts_as_long_over_a_reopening(machine, set_to):
    machine.set(set_to[0])
    machine.run(OPEN_QUEUE.format(None) + 'q.put(b"x", delay=3600); q.put(b"y", delay=60*86400)')
    machine.set(set_to[1], passed=HOUR - 60)
    assert machine.run(OPEN_QUEUE.format(None) + "print(get(q, 0.1))") == "nothing"
    machine.set(set_to[1], passed=HOUR)
    assert machine.run(OPEN_QUEUE.format(None) + "print(get(q, 20), get(q, 0))") == "x nothing"
    machine.set(set_to[1], passed=60 * DAY - 60)
    assert machine.run(OPEN_QUEUE.format(None) + "print(get(q, 0.1))") == "nothing"
    machine.set(set_to[1], passed=60 * DAY)
    assert machine.run(OPEN_QUEUE.format(None) + "print(get(q, 20))") == "y"


@pytest.mark.parametrize("ordering", [None, "key"])
def test_a_time_of_the_wall_clock_comes_when_that_says_so(machine, ordering):
    """In all processes that have the queue open; nothing wakes them but the look at the clock."""
    waiter = OPEN_QUEUE.format(ordering) + 'print("open", flush=True); ask(); print(get(q, 30))\n'
    putter = OPEN_QUEUE.format(ordering) + (
        'q.put(b"x", key=b"k", at=int((time.time() + 3600) * 1e6))\nprint("put", flush=True)\n'
        "ask(); print(get(q, 0.3), flush=True); ask()\n"
    )
    with machine.process(waiter) as other, machine.process(putter) as first:
        assert [first.stdout.readline(), other.stdout.readline()] == ["put\n", "open\n"]
        machine.set(-2 * HOUR, passed=2 * HOUR)  # the hour passed, but the clock was set back
        say(first)
        assert first.stdout.readline() == "nothing\n"
        say(other)
        machine.set(0, passed=2 * HOUR)
        assert other.stdout.readline() == "x\n"
        say(first)


def test_a_step_forward_is_seen_within_two_seconds(machine):
    code = OPEN_QUEUE.format(None) + (
        'q.put(b"x", at=int((time.time() + 3600) * 1e6)); print("put", flush=True)\n'
        "begun = time.monotonic(); print(get(q, 30)); print(time.monotonic() - begun, flush=True)\n"
    )
    with machine.process(code) as child:
        assert child.stdout.readline() == "put\n"
        machine.set(HOUR)
        assert child.stdout.readline() == "x\n"
        assert float(child.stdout.readline()) < 15  # of a slow machine; it is not found by luck


def test_a_time_to_live_and_a_dedup_window_are_not_set(machine):
    opened = 'q = millstream.open(path).queue("q", dedup_window=3600.0)\n'
    first = machine.run(opened + 'print(q.put(b"x", ttl=3600, dedup_id="a"))')
    for wall in (400 * DAY, TO_1970, -5 * HOUR):
        machine.set(wall)
        assert machine.run(opened + 'print(q.put(b"x", dedup_id="a"), len(q))') == f"{first} 1"
    machine.set(-5 * HOUR, passed=HOUR)
    again = opened + 'print(get(q, 0.2), q.put(b"y", dedup_id="a"))'
    assert machine.run(again) not in (f"nothing {first}", f"x {first}")
    assert machine.run(opened + "print(get(q, 5), len(q))") == "y 0"


# --- ages, with real processes --------------------------------------------------------------------

FILL = (
    's = millstream.open(path).stream("s", segment_bytes=65536,'
    ' retention=millstream.Retention(age="{}"))\n'
    "for _ in range(20): s.append(bytes(20000))\n"
)
LOOK = (
    's = millstream.open(path).stream("s")\n'
    "s._retire(s._log(0))\nprint(s.stats().partitions[0].first_offset)\n"
)


@pytest.mark.parametrize("wall", [400 * DAY, TO_1970])
def test_records_of_a_wrong_clock_go_when_they_are_old_and_not_before(machine, wall):
    """A clock that was ahead pins nothing; one that is corrected from 1970 removes nothing."""
    machine.set(wall)
    machine.run(FILL.format("1h"))
    for later in (wall, 0.0, 400 * DAY, TO_1970):
        machine.set(later)
        assert machine.run(LOOK) == "0"
    machine.set(0.0, passed=HOUR + 60)
    assert int(machine.run(LOOK)) > 0


def test_tombstones_of_a_wrong_clock_go_when_they_are_old_and_not_before(machine):
    opened = (
        's = millstream.open(path).stream("s", segment_bytes=65536,'
        ' compact=millstream.Compaction(tombstone_age="1h"))\n'
    )
    machine.set(400 * DAY)
    machine.run(
        opened + 's.append(b"v", key=b"k" * 9000); s.append(None, key=b"k" * 9000)\n'
        "for i in range(6): s.append(bytes(20000), key=b'%d' % i)\ns.compact()\n"
    )
    compact = opened + "print(s.compact().tombstones_removed)"
    for wall in (400 * DAY, 0.0, 800 * DAY):
        machine.set(wall)
        assert machine.run(compact) == "0"
    machine.set(0.0, passed=HOUR + 60)
    assert machine.run(compact) == "1"


# --- over boots -----------------------------------------------------------------------------------


@pytest.fixture
def boots(monkeypatch):
    """Let the machine be booted anew: under the virtual clock, whose boots are given."""

    class Boots:
        def __init__(self) -> None:
            self.number = 0
            monkeypatch.setattr(_native, "virtual_clock", lambda: f"boot {self.number}")

        def again(self) -> None:
            self.number += 1

    return Boots()


def test_over_a_boot_a_delay_goes_by_the_wall_clock(tmp_path, boots):
    with clock() as time:
        with millstream.open(tmp_path, durability="process") as store:
            store.queue("q").put(b"x", delay=HOUR)
        boots.again()
        time.set_wall(HOUR - 60)  # so long the machine was off
        with millstream.open(tmp_path) as store:
            assert store.queue("q").get_many(1, timeout=0) == []
            time.advance(61)
            assert [m.value for m in store.queue("q").get_many(1, timeout=5)] == [b"x"]


@pytest.mark.parametrize("clean", [True, False])
def test_over_a_boot_a_delay_is_never_longer_than_it_was(tmp_path, boots, clean):
    with clock() as time:
        store = millstream.open(tmp_path, durability="process")
        store.queue("q").put(b"x", delay=HOUR)
        store._background._note_time()
        copy = tmp_path if clean else tmp_path.parent / f"{tmp_path.name}.killed"
        if not clean:
            subprocess.run(["cp", "-a", tmp_path, copy], check=True)
        store.close()
        boots.again()
        time.set_wall(-400 * DAY)
        with millstream.open(copy) as store:
            time.advance(HOUR - 60)
            assert store.queue("q").get_many(1, timeout=0) == []
            time.advance(61)
            assert [m.value for m in store.queue("q").get_many(1, timeout=5)] == [b"x"]


def kept(path, age):
    """How many records there are when retention has looked."""
    with millstream.open(path) as store:
        stream = store.stream("s", segment_bytes=65536)
        stream.alter(retention=millstream.Retention(age=age))
        stream._retire(stream._log(0))
        part = stream.stats().partitions[0]
        return part.next_offset - part.first_offset


def filled(path):
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=65536)
        for _ in range(20):
            stream.append(bytes(20000))


def test_a_clock_that_is_ahead_at_a_boot_is_not_enough_to_delete(tmp_path, boots):
    with clock() as time:
        filled(tmp_path)
        boots.again()
        time.set_wall(400 * DAY)
        assert kept(tmp_path, "2d") == 20
        time.advance(HOUR)
        assert kept(tmp_path, "2d") == 20  # the hour has confirmed one day
        time.set_wall(-400 * DAY)  # corrected: what was not confirmed never was
        time.advance(20 * HOUR)
        assert kept(tmp_path, "2d") == 20
        boots.again()
        time.set_wall(60)
        time.advance(3 * HOUR)
        assert kept(tmp_path, "2d") == 20
        filled(tmp_path)
        count = kept(tmp_path, "2d")
        time.advance(2 * HOUR)
        assert 20 < kept(tmp_path, "2d") < count  # of those before the boot some
        time.advance(45 * HOUR)
        assert kept(tmp_path, "2d") > 20  # the others are as old as they are
        time.advance(2 * HOUR)
        assert kept(tmp_path, "2d") < 20


def test_what_passed_while_the_machine_was_off_counts_in_the_end(tmp_path, boots):
    with clock() as time:
        filled(tmp_path)
        boots.again()
        time.set_wall(10 * DAY)
        assert kept(tmp_path, "7d") == 20
        time.advance(3 * HOUR)
        assert kept(tmp_path, "7d") == 20
        boots.again()  # what was not confirmed yet is not forgotten
        time.set_wall(60)
        assert kept(tmp_path, "7d") == 20
        time.advance(4 * HOUR)
        assert kept(tmp_path, "7d") < 20


def test_a_boot_in_1970_with_a_later_correction_deletes_nothing_young(tmp_path, boots):
    with clock() as time:
        time.set_wall(TO_1970)
        filled(tmp_path)
        boots.again()
        time.set_wall(-TO_1970)
        assert kept(tmp_path, "1h") == 20
        time.advance(HOUR + 60)
        assert kept(tmp_path, "1h") < 20


def without_clock(path):
    """Make a store one of an earlier version, which had no clock: times in it are the wall's."""
    config = os.path.join(path, "store.json")
    body = json.loads(Path(config).read_bytes())["body"]
    del body["clock"]
    files.write_json(config, body)


def test_a_store_of_an_earlier_version_whose_clock_was_ahead_is_not_pinned(tmp_path, boots):
    with clock() as time:
        time.set_wall(400 * DAY)
        filled(tmp_path)
        with millstream.open(tmp_path, durability="process") as store:
            store.queue("q", dedup_window=HOUR).put(b"x", delay=HOUR, dedup_id="a")
            store.queue("q").put(b"y", ttl=HOUR)
        time.set_wall(-400 * DAY)
        without_clock(tmp_path)
        boots.again()
        assert kept(tmp_path, "1h") == 20
        for _ in range(3):
            time.advance(HOUR / 4)
            boots.again()
            time.set_wall(60)
            assert kept(tmp_path, "1h") == 20
            with millstream.open(tmp_path) as store:
                assert len(store.queue("q")) == 2
        time.advance(HOUR / 2)
        assert kept(tmp_path, "1h") < 20
        with millstream.open(tmp_path) as store:
            queue = store.queue("q")
            with queue.get(timeout=5) as message:
                assert message.value == b"x"
            assert len(queue) == 0
            assert queue.put(b"z", dedup_id="a") > 0
            assert len(queue) == 1


# --- what is shown, kept, and undone --------------------------------------------------------------


def test_times_are_shown_by_the_wall_clock_as_it_is_now():
    with clock() as time, millstream.temporary() as store:
        time.set_wall(TO_1970)
        queue = store.queue("q", retry=millstream.RetryPolicy(max_attempts=1))
        queue.put(b"x")
        queue.put(b"y", at=int((time.now + HOUR) * 1e6))
        time.set_wall(-TO_1970)
        today = datetime.fromtimestamp(time.now, UTC)
        with queue.get(timeout=5) as message:
            assert abs((message.put_at - today).total_seconds()) < 60
            assert abs((message.deadline - today).total_seconds()) < HOUR
            message.nack()
        letter = queue.dead.list()[0]
        for shown in (letter.put_at, letter.first_at, letter.last_at):
            assert shown is not None
            assert abs((shown - today).total_seconds()) < 60


def test_the_newer_of_two_failures_is_shown_whatever_the_clock_said():
    with clock() as time, millstream.temporary() as store:
        queue = store.queue("q", retry=millstream.RetryPolicy(max_attempts=2, backoff=0))
        queue.put(b"x")
        queue.get(timeout=5).nack(reason="first")
        time.set_wall(-5 * HOUR)
        time.advance(HOUR)
        queue.get(timeout=5).nack(reason="second")
        letter = queue.dead.list()[0]
        assert (letter.first_error, letter.last_error) == ("first", "second")


@pytest.mark.parametrize("wall", [-5 * HOUR, 400 * DAY])
@pytest.mark.parametrize("ordering", [None, "key"])
def test_transactions_redrive_and_backups_keep_the_rule(tmp_path, wall, ordering):
    with clock() as time:
        with millstream.open(tmp_path / "store", durability="process") as store:
            queue = store.queue("q", ordering=ordering)
            with store.transaction() as tx:
                tx.put(queue, b"delay", delay=HOUR, key=b"a")
                tx.put(queue, b"at", at=int((time.now + HOUR) * 1e6), key=b"b")
                tx.put(queue, b"ttl", delay=2 * HOUR, ttl=3 * HOUR, key=b"c")
                time.set_wall(wall)
            store.backup(tmp_path / "copy")
        for path in (tmp_path / "copy", tmp_path / "store"):
            time.advance(HOUR / 2 - 60)
            with millstream.open(path) as store:
                early = [m.value for m in store.queue("q").get_many(9, timeout=0)]
                assert early == ([b"at"] if wall > 0 else [])
        time.advance(121)
        for path in (tmp_path / "copy", tmp_path / "store"):
            with millstream.open(path) as store:
                queue = store.queue("q")
                with queue.get(timeout=5) as message:
                    assert message.value == (b"at" if wall > 0 else b"delay")
        time.advance(HOUR)
        with millstream.open(tmp_path / "store") as store:
            queue = store.queue("q")
            found = {m.value for m in queue.get_many(9, timeout=5)}
            found |= {m.value for m in queue.get_many(9, timeout=0)}
            assert b"ttl" in found


def test_a_delay_since_an_attempt_is_not_the_wall_clocks():
    """Of a message that was put for a time of the wall clock, too, given back, and redriven."""
    with clock() as time, millstream.temporary() as store:
        queue = store.queue("q", retry=millstream.RetryPolicy(max_attempts=2))
        queue.put(b"x", at=int((time.now + HOUR) * 1e6))
        time.advance(HOUR + 1)
        queue.get(timeout=5).release(delay=HOUR)
        time.set_wall(HOUR)
        time.advance(HOUR - 60)
        assert queue.get_many(1, timeout=0) == []
        time.set_wall(-10 * HOUR)
        time.advance(61)
        queue.get(timeout=5).nack(delay=HOUR)
        time.set_wall(20 * HOUR)
        assert queue.get_many(1, timeout=0.01) == []
        time.set_wall(-20 * HOUR)
        time.advance(HOUR + 1)
        queue.get(timeout=5).reject()
        assert queue.dead.redrive() == 1
        assert [m.value for m in queue.get_many(1, timeout=5)] == [b"x"]


def test_the_clock_of_a_store_needs_no_file_but_its_own(tmp_path):
    """A note that is torn is none; a clock that is none is refused before anything is changed."""
    with millstream.open(tmp_path) as store:
        began = store.session.clock.now()
    with Path(tmp_path, "members").open("r+b") as members:
        members.seek(32)
        members.write(struct.pack("<qqQ", 1 << 62, 1 << 62, 5))
    with millstream.open(tmp_path) as store:
        assert 0 <= store.session.clock.now() - began < 3600e6
    config = os.path.join(tmp_path, "store.json")
    body = json.loads(Path(config).read_bytes())["body"]
    body["clock"]["offset"] = "soon"
    files.write_json(config, body)
    with pytest.raises(millstream.CorruptBatch, match="clock"):
        millstream.open(tmp_path)
