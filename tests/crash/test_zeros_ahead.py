"""Zeros written ahead of a fast log: no kill, power cut, full disk or other writer makes them data.

The files here are small, so the pace at which it begins is lowered; what is done then is the same.
"""

import errno
import itertools
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

import crash_workers as workers
import pytest
from test_page_drop import Workload, cut_and_judge

import millstream
from millstream import _native
from millstream.log import ahead

STATES = 150
BYTES = 16 << 20  # of a writer of the storm


def begin_at_once(patch=None):
    """Fill ahead of any log that grows at all; how often it was done is counted in a list."""
    fills = []
    original = ahead.Ahead.go_on

    def go_on(self, log, level):
        goes_on = original(self, log, level)
        if log.native.ready > log.native.tail + _native.FILL_BYTES // 2:
            fills.append(log.native.ready)
        return goes_on

    for name, value in (("WARM_BYTES", 0), ("_are_large", lambda *_: True)):
        patch.setattr(ahead, name, value) if patch else setattr(ahead, name, value)
    patch.setattr(ahead.Ahead, "go_on", go_on) if patch else setattr(ahead.Ahead, "go_on", go_on)
    return fills


class FastWorkload(Workload):
    """Batches of which some ten go into what one fill makes ready."""

    def __init__(self, store):
        super().__init__(store, 1)
        self.stream.alter(segment_bytes=4 << 20)

    def step(self, letter, partition):
        if letter == "sync":
            self.stream.flush()
            self.durable = list(self.tried)
        else:
            count, size = {"small": (1, 50), "batch": (5, 9_000), "large": (3, 90_000)}[letter]
            self.append(partition, count, size, "process")


def test_a_power_cut_over_zeroed_and_stored_pages_leaves_a_prefix(memory_directory, monkeypatch):
    seed = workers.seed_of("zeros_ahead")
    dice = random.Random(seed)
    fills = begin_at_once(monkeypatch)
    letters = ("small", "batch", "batch", "large", "sync")
    ops, states = cut_and_judge(
        memory_directory, monkeypatch, dice, FastWorkload, letters, (10, 60), 0.2, STATES
    )
    assert len(fills) > STATES // 3, "hardly anything was filled"
    workers.report(ops, states, seed)


class SyncedWorkload(Workload):
    """Batches at level "sync", stored over zeros where they are long, and others between them."""

    def __init__(self, store):
        super().__init__(store, 1)
        self.stream.alter(segment_bytes=2 << 20)


def test_a_power_cut_over_zeroed_pages_of_synced_batches_leaves_a_prefix(
    memory_directory, monkeypatch
):
    seed = workers.seed_of("zeros_of_a_batch")
    letters = ("large sync", "large sync", "small sync", "page", "small")
    ops, states = cut_and_judge(
        memory_directory, monkeypatch, random.Random(seed), SyncedWorkload, letters, (10, 60), 0.2,
        STATES,
    )  # fmt: skip
    workers.report(ops, states, seed)


def append_fast(path, history, name, seed, options):
    """Append BYTES, filling ahead or not as an older process would not; die where it is asked."""
    dice = random.Random(f"{seed} {name}")
    account = workers.History(history, name)
    fills = begin_at_once() if options["fills"] else []
    with millstream.open(path, durability=options["durability"]) as store:
        stream = store.stream("s", segment_bytes=8 << 20)
        if not options["fills"]:
            stream._log(0).ahead.folios = False
        print("open", flush=True)
        number = done = 0
        while done < BYTES:
            count, size = dice.choice((1, 3)), dice.choice((10, 3_000, 60_000))
            values = [b"%s:%d" % (name.encode(), number + i) for i in range(count)]
            number += count
            done += count * size
            account.tried(*values)
            (span,) = stream.append_many([value + b" " + b"x" * size for value in values])
            account.acknowledged(span, *values)
            if len(fills) == options.get("die_after"):
                os.kill(os.getpid(), signal.SIGKILL)  # zeros lie ahead, nothing is in them


@pytest.mark.parametrize("durability", ["process", "interval", "sync"])
def test_writers_that_fill_and_that_do_not_are_killed(tmp_path, durability):
    seed = workers.seed_of("fillers_killed")
    dice = random.Random(seed)
    store, history = str(tmp_path / "store"), tmp_path / "history"
    history.mkdir()
    kills, names = 0, iter(range(1000))

    def writer():
        options = {"durability": durability, "fills": dice.random() < 0.75}
        if options["fills"] and dice.random() < 0.5:
            options["die_after"] = dice.randrange(1, 12)
        return workers.start(
            "test_zeros_ahead.append_fast", store, str(history), f"w{next(names)}", seed, options
        )

    running = [writer() for _ in range(3)]
    while kills < 20:
        victim = running.pop(dice.randrange(len(running)))
        if workers.line(victim) == "open" and dice.random() < 0.5:
            before, more = size_of(history), dice.randrange(30_000)
            workers.until(
                lambda v=victim, b=before, m=more: v.poll() is not None
                or size_of(history) >= b + m,
                "progress",
            )  # fmt: skip
        workers.kill(victim)
        kills += victim.returncode == -signal.SIGKILL
        running.append(writer())
    for one in running:
        workers.line(one)
        one.wait(workers.DEADLINE_S)
        workers.kill(one)
    records, _ = workers.judge(store, history)
    workers.verified(store)
    workers.report(records, kills, seed)


def size_of(directory):
    return sum(path.stat().st_size for path in directory.glob("*.history"))


def test_a_disk_that_refuses_zeros_costs_nothing_but_speed(tmp_path, monkeypatch):
    begin_at_once(monkeypatch)
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s")
        log = stream._log(0)
        refused = []

        class Full:
            """The partition of a log, on a disk where the zeros find no room."""

            def __init__(self, native):
                self.native = native

            def __getattr__(self, name):
                return getattr(self.native, name)

            def fill(self, segment, begin, end):
                refused.append(begin)
                return -errno.ENOSPC

        log.native = Full(log.native)
        for number in range(100):
            stream.append(b"%d" % number * 20_000)
        assert len(refused) == 1
        assert log.ahead.folios is False
        values = [value for batch in stream.read() for value in batch.values]
        assert values == [b"%d" % number * 20_000 for number in range(100)]


def test_an_error_of_the_disk_is_told_apart_from_a_position(tmp_path, monkeypatch):
    begin_at_once(monkeypatch)
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", segment_bytes=4 << 20)
        for _ in range(40):
            stream.append(bytes(100_000))
        native = stream._log(0).native
        descriptor = os.open(native.active.path, os.O_RDONLY)
        native.active.fill_with(descriptor)
        assert native.fill(native.active, native.tail, native.tail + (2 << 20)) == -errno.EBADF
        assert native.active.can_fill  # it was put back
        with pytest.raises(millstream.StorageError):
            stream._log(0).ahead.go_on(stream._log(0), "process")
        stream.append(b"last")
        assert [batch.values[-1] for batch in stream.read()][-1] == b"last"


def append_all(stream, count=60):
    for number in range(count):
        stream.append(b"%d" % number * 50_000)
    found = [value for batch in stream.read() for value in batch.values]
    assert found == [b"%d" % number * 50_000 for number in range(count)]


@pytest.fixture
def opened(monkeypatch):
    """Numbers of the segments that were opened to write zeros to them."""
    numbers, original = [], ahead._open
    monkeypatch.setattr(
        ahead, "_open", lambda log, one: (numbers.append(one.number), original(log, one))[1]
    )
    return numbers


def test_a_slow_log_has_no_zeros_ahead(tmp_path, monkeypatch, opened):
    hours = itertools.count(1, 3600)
    monkeypatch.setattr(ahead, "time", types.SimpleNamespace(monotonic=lambda: next(hours)))
    with millstream.open(tmp_path / "s", durability="process") as store:
        append_all(store.stream("s", segment_bytes=8 << 20), 200)
    assert next(hours) > 3 * 3600, "it was never asked"
    assert opened == []


def test_a_log_at_sync_has_none(tmp_path, monkeypatch, opened):
    begin_at_once(monkeypatch)
    with millstream.open(tmp_path / "s", durability="sync") as store:
        append_all(store.stream("s", segment_bytes=4 << 20))
        store.stream("s").append(b"of another level", durability="process")
    assert opened == []


def test_where_folios_are_small_the_background_does_it(tmp_path, monkeypatch, opened):
    begin_at_once(monkeypatch)
    monkeypatch.setattr(ahead, "_are_large", lambda *_: False)
    monkeypatch.setattr(ahead, "TRIES", 3)
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", segment_bytes=4 << 20)
        append_all(stream, 200)
        found = stream._log(0).ahead
        assert found.folios is False
        assert (found.low("process"), found.low("interval")) == (0, 0)
    assert 0 < len(opened) <= 3


def test_threads_of_one_process_fill_and_append_side_by_side(tmp_path, monkeypatch):
    fills = begin_at_once(monkeypatch)
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", segment_bytes=4 << 20)

        def work(name):
            for number in range(150):
                stream.append(b"%d:%d " % (name, number) + b"x" * 30_000)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [bytes(v).split(b" ")[0] for batch in stream.read() for v in batch.values]
    assert sorted(found) == sorted(b"%d:%d" % (a, b) for a in range(4) for b in range(150))
    assert len(fills) > 20


def test_the_descriptor_to_fill_with_is_closed_with_its_segment(tmp_path, monkeypatch):
    begin_at_once(monkeypatch)
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 20)
        for _ in range(3):
            stream.append(bytes(100_000))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(300):
            stream.append(bytes(100_000))
        stream.delete_before(stream.get(0, 300).position)
        assert len(os.listdir("/proc/self/fd")) < before + 12


LONG_AT_SYNC = """
import sys, millstream
with millstream.open(sys.argv[1], durability="sync") as store:
    for number in range(20):
        store.stream("s").append_many([b"%02d" % number * 25] * 1_000)
        store.stream("s").append(b"short")
"""


@pytest.mark.parametrize("disk", ["sound", "full"])
def test_a_long_batch_at_sync_is_stored_over_zeros_of_one_call(tmp_path, disk):
    """Where they are refused, it is stored all the same."""
    workers.need("strace")
    with millstream.open(tmp_path / "s") as store:
        log = store.stream("s", segment_bytes=8 << 20)
        for _ in range(15):
            log.append_many([bytes(100)] * 1_000)
        segment = log._log(0).native.active  # the rest goes into it
        assert segment.size - (log._log(0).native.tail - segment.base_position) > 20 * 60_000
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=pwrite64", "-P"]
    command.append(str(segment.path))
    if disk == "full":
        command += ["-e", "inject=pwrite64:error=ENOSPC"]
    command += [sys.executable, "-c", LONG_AT_SYNC, str(tmp_path / "s")]
    subprocess.run(command, check=True, timeout=120)
    calls = re.findall(r", (\d+), \d+\) += +(-?\d+)", trace.read_text())
    assert len(calls) == 19, calls  # the first one opens what it is synced with
    assert all(50_000 < int(size) < 130_000 for size, _ in calls)
    assert all(done == ("-1" if disk == "full" else size) for size, done in calls)
    with millstream.open(tmp_path / "s") as store:
        found = [value for batch in store.stream("s").read(start=15_000) for value in batch.values]
    assert found == [
        value for number in range(20) for value in [b"%02d" % number * 25] * 1_000 + [b"short"]
    ]


def test_threads_at_sync_keep_one_descriptor_of_a_segment(tmp_path):
    with millstream.open(tmp_path / "s", durability="sync") as store:
        stream = store.stream("s")

        def work():
            for _ in range(30):
                stream.append(bytes(50_000))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(len(batch) for batch in stream.read()) == 120
        kept = [os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")]
        segments = [path for path in kept if path.endswith(".seg")]
        assert segments and len(segments) == len(set(segments))


def numbered(number, count=100):
    return [b"<%06d>" % (number * count + at) * 8 for at in range(count)]


def test_a_damaged_control_page_has_nothing_zeroed(tmp_path):
    """What an append asks before it stores is asked before the zeros."""
    with millstream.open(tmp_path / "s", durability="sync") as store:
        stream = store.stream("s", partitions=1)
        for number in range(40):
            stream.append_many(numbered(number))
        native = stream._log(0).native
        path, tail = Path(str(native.active.path)), native.tail
        control = os.open(tmp_path / "s" / "streams" / "s" / "control", os.O_RDWR)

        def set_tail(position):  # that of the first partition's page
            os.pwrite(control, struct.pack("<Q", position), 4096 + 8)

        before = path.read_bytes()
        set_tail(tail ^ (1 << 18))  # one bit
        with pytest.raises(millstream.CorruptBatch):
            stream.append_many([b"z" * 100] * 1_000)
        assert path.read_bytes() == before
        set_tail(tail)
        os.close(control)
        assert sum(len(batch) for batch in stream.read()) == 4_000


def test_nothing_behind_damage_is_zeroed_by_who_mends_for_the_dead(tmp_path):
    """A killed owner's word leads to the damaged segment, which is the active one from then on."""
    writer = workers.start("test_zeros_ahead.append_and_die", str(tmp_path / "s"))
    writer.communicate(timeout=workers.DEADLINE_S)
    (path,) = (tmp_path / "s").glob("streams/s/00000/*1.seg")
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(data.find(b"<003850>"))
        file.write(b"\xff" * 3)
    before = path.read_bytes()
    with millstream.open(tmp_path / "s", durability="sync") as store:
        stream = store.stream("s")
        with pytest.raises(millstream.CorruptBatch):
            stream.append(b"short")
        native, log = stream._log(0).native, stream._log(0)
        log.follow_active()  # as for the word of a dead owner
        assert native.active is not None
        for _ in range(2):
            with pytest.raises(millstream.CorruptBatch):
                stream.append_many([b"z" * 100] * 1_000)
        assert path.read_bytes() == before


def append_and_die(path):
    stream = millstream.open(path, durability="sync").stream("s", partitions=1)
    for number in range(40):
        stream.append_many(numbered(number))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_killed_at_its_zeros_loses_nothing(tmp_path):
    """By the kernel, at the n-th call that writes them."""
    workers.need("strace")
    with millstream.open(tmp_path / "s", durability="sync") as store:
        for _ in range(15):
            store.stream("s").append_many([b"first" * 20] * 1_000)
    program = (
        "import sys, millstream\n"
        "stream = millstream.open(sys.argv[1], durability='sync').stream('s')\n"
        "for number in range(9):\n"
        "    stream.append_many([b'%s:%d' % (sys.argv[2].encode(), number)] * 9_000)\n"
        "    print(number, flush=True)\n"
    )
    acknowledged, kills = [], 0
    for when in range(1, 9):
        command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=pwrite64"]
        command += ["-e", f"inject=pwrite64:signal=SIGKILL:when={when}", sys.executable, "-c"]
        done = subprocess.run(
            [*command, program, str(tmp_path / "s"), str(when)], capture_output=True, text=True
        )
        kills += done.returncode != 0
        acknowledged += [b"%d:%s" % (when, number.encode()) for number in done.stdout.split()]
    with millstream.open(tmp_path / "s") as store:
        found = [value for batch in store.stream("s").read() for value in batch.values]
    assert {found.count(value) for value in acknowledged} <= {9_000}
    assert kills >= 6 and len(acknowledged) >= 3, (kills, acknowledged)
    workers.report(len(found), kills, 0)


@pytest.mark.parametrize("durability", ["process", "sync"])
def test_no_thread_of_a_process_alone_waits_for_others(tmp_path, durability):
    """`timeout` is for other processes: the word that zeros are written under is not one's own."""
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", partitions=1)
        ended = threading.Event()

        def append():
            try:
                for _ in range(40):
                    stream.append_many([b"x" * 100] * 10_000, durability=durability)
            finally:
                ended.set()

        thread = threading.Thread(target=append)
        thread.start()
        count = 0
        while not ended.is_set():
            stream.append(b"y", timeout=0)
            count += 1
        thread.join()
        assert count > 0
        assert stream.next_offset(0) == 400_000 + count
