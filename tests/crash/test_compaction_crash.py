"""Compaction killed, refused, or cut off from power at any moment: every key keeps its last value.

Record number i is always the same, so what is at an offset says whether it is right, and the
number of the next one which values must be the last.
"""

import errno
import itertools
import os
import random
import shutil
import signal
import time

import crash_workers as workers
import pytest
from page_drop_disk import Disk

import millstream
from millstream.disk import files
from millstream.errors import StorageError, StoreFull
from millstream.store.background import Background

SEGMENT = 1 << 16
KEYS = 40
KEEP = millstream.Compaction(tombstone_age=0)
CHANGING = (
    "write", "sync", "rename", "remove", "_sync_directory", "allocate", "extend", "close",
    "open_file", "map_file",
)  # fmt: skip


def row(number):
    """(key, value) of a record; every ninth is a tombstone."""
    key = b"k%d" % (number * 7919 % KEYS)
    return key, None if number % 9 == 0 else b"%d " % number + b"v" * (number * 31 % 300)


def append(stream, count):
    first = stream.next_offset(0)
    rows = [row(number) for number in range(first, first + count)]
    stream.append_many([value for _, value in rows], keys=[key for key, _ in rows])


def opened(store):
    return store.stream("s", segment_bytes=SEGMENT, compact=KEEP)


def judge(stream, least=0, *, alone=True):
    """Every offset has its record or none, every key its last value; how many were appended."""
    total = stream.next_offset(0)
    assert total >= least
    found, last = {}, {}
    for batch in stream.read():
        rows = zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True)
        for offset, key, value in rows:
            record = bytes(key), None if value is None else bytes(value)
            assert record == row(offset), f"offset {offset}"
            assert offset not in found
            found[offset] = record
            last[record[0]] = record[1]
    wanted = dict(row(number) for number in range(total))
    wanted = {key: value for key, value in wanted.items() if value is not None}
    assert {key: value for key, value in last.items() if value is not None} == wanted
    assert not alone or stream.stats().records == len(found)
    return total


def finish(path, least=0):
    """Open what is left, judge it, go on with it, and judge it again by both readers."""
    for _ in range(2):
        with millstream.open(path) as store:
            stream = opened(store)
            total = judge(stream, least)
            append(stream, 300)
            stream.compact()
            assert judge(stream) == total + 300
            directory = os.path.join(stream.path, "00000")
            assert not [name for name in os.listdir(directory) if ".compact" in name]
    workers.verified(path)


@pytest.fixture
def prepared(tmp_path):
    """A store that has something to compact, of which some was compacted before."""
    path = tmp_path / "prepared"
    with millstream.open(path, durability="process") as store:
        stream = opened(store)
        for _ in range(6):
            append(stream, 100)
        stream.compact()
        for _ in range(6):
            append(stream, 100)
    return path


def compact_until(path, calls):
    """Compact; die by SIGKILL at a call to the file system."""
    with millstream.open(path) as store:
        stream = opened(store)
        stream._log(0)
        left = [calls]

        def counted(function):
            def call(*arguments, **named):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*arguments, **named)

            return call

        for name in CHANGING:
            setattr(files, name, counted(getattr(files, name)))
        stream.compact()
        print(calls - left[0], flush=True)
        os._exit(0)


@pytest.mark.slow
def test_killed_at_every_file_operation(prepared, tmp_path):
    text = workers.run(
        "test_compaction_crash.compact_until", str(copied(prepared, tmp_path)), 1 << 30
    )
    total = int(text)
    assert total > 40
    each = 1 if os.environ.get("MILLSTREAM_FULL") else 2
    steps = range(0, total, each)
    for step in steps:
        path = copied(prepared, tmp_path)
        worker = workers.start("test_compaction_crash.compact_until", str(path), step)
        worker.wait(workers.DEADLINE_S)
        assert worker.returncode == -signal.SIGKILL
        workers.kill(worker)
        finish(path, 1200)
    workers.report(len(steps), len(steps), 0)


def copied(prepared, tmp_path):
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(prepared, path)
    return path


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_refused_at_every_file_operation_harms_nothing(prepared, tmp_path, monkeypatch, code):
    kind = StoreFull if code == errno.ENOSPC else StorageError
    for step in itertools.count():
        path = copied(prepared, tmp_path)
        with millstream.open(path) as store:
            stream = opened(store)
            log = stream._log(0)
            left = [step]

            def counted(function, left=left):
                def call(*arguments, **named):
                    left[0] -= 1
                    if left[0] == -1:
                        raise kind(code, "injected", "somewhere")
                    return function(*arguments, **named)

                return call

            with monkeypatch.context() as patch:
                for name in CHANGING:
                    if name not in ("close", "remove"):
                        patch.setattr(files, name, counted(getattr(files, name)))
                failed = False
                try:
                    stream.compact()
                except (StorageError, millstream.Indeterminate):
                    failed = True
            judge(stream, 1200)
            if log.native.poison == 0:  # the sync of the log before the run failed, or not
                append(stream, 50)
                stream.compact()
                judge(stream, 1250)
        if left[0] >= 0:
            break
        assert failed or code == errno.ENOSPC, "the reserve helps out"
    assert step > 25
    finish(path)
    workers.report(step, step, 0)


def work(path):
    """Append, compact, and say nothing."""
    with millstream.open(path, durability="process") as store:
        stream = opened(store)
        print("open", flush=True)
        for memory in itertools.cycle((32 * 20, "1MiB", "1MiB", 32 * 20)):
            append(stream, 150)
            stream.compact(memory=memory)


@pytest.mark.slow
def test_killed_at_random(tmp_path):
    seed = workers.seed_of("compaction_kills")
    dice = random.Random(seed)
    path = tmp_path / "store"
    kills, total = 40, 0
    for _ in range(kills):
        worker = workers.start("test_compaction_crash.work", str(path))
        assert workers.line(worker) == "open"
        time.sleep(dice.random() * 0.25)  # the moment of the kill is what varies
        workers.kill(worker)
        with millstream.open(path) as store:
            total = judge(opened(store), total)
        workers.verified(path)
    finish(path, total)
    workers.report(total, kills, seed)


def test_killed_while_others_read_append_and_compact(tmp_path):
    """The owner of the compact word dies; another process takes over while it lives on."""
    seed = workers.seed_of("compaction_takeover")
    dice = random.Random(seed)
    path = tmp_path / "store"
    kills = 15
    with millstream.open(path, durability="process") as store:
        stream = opened(store)
        append(stream, 1000)
        for _ in range(kills):
            worker = workers.start("test_compaction_crash.only_compact", str(path))
            try:
                assert workers.line(worker) == "open"
                deadline = time.monotonic() + dice.random() * 0.2
                while time.monotonic() < deadline:
                    append(stream, 100)
                    judge(stream, alone=False)
            finally:
                workers.kill(worker)
            stream.compact()
            total = judge(stream)
    finish(path, total)
    workers.report(total, kills, seed)


def only_compact(path):
    """Compact for ever."""
    with millstream.open(path, durability="process") as store:
        stream = opened(store)
        print("open", flush=True)
        while True:
            stream.compact()


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of a few MiB."""
    import subprocess

    workers.need("mount", root=True)
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(where)], check=True)
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.root
def test_full_disk_is_store_full_and_harms_nothing(small_disk):
    path = small_disk / "store"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 20, compact=KEEP)
        append(stream, 1)
        try:
            while True:
                append(stream, 500)
        except StoreFull:
            pass
        total = judge(stream)
        for _ in range(3):
            try:
                stream.compact()
            except StoreFull as error:
                assert error.filename
            assert judge(stream) == total
        free = shutil.disk_usage(small_disk).free
        assert free > 1 << 20, "what was left was enough to begin with"
        append(stream, 500)
    workers.verified(path)
    workers.report(total, 1, 0)


def test_power_cut_at_any_moment_keeps_what_was_durable(memory_directory, monkeypatch):
    seed = workers.seed_of("compaction_power")
    dice = random.Random(seed)
    monkeypatch.setattr(Background, "notice", lambda *_: None)
    states = ops = 0
    while states < 150:
        live = memory_directory / "live"
        cuts = []
        with monkeypatch.context() as patch:
            live.mkdir()
            disk = Disk(live, patch)
            store = millstream.open(live, durability="process")
            stream = opened(store)
            durable = [0]

            def cut(chance, disk=disk, cuts=cuts, durable=durable):
                if dice.random() < chance:
                    target = memory_directory / f"cut{len(cuts)}"
                    disk.cut(target, dice)
                    cuts.append((target, durable[0]))

            disk.on_call = lambda cut=cut: cut(0.05)
            for _ in range(dice.randrange(2, 6)):
                append(stream, dice.randrange(200, 700))
                if dice.random() < 0.5:
                    stream.flush()
                    durable[0] = stream.next_offset(0)
                cut(0.3)
                done = stream.next_offset(0)
                stream.compact()  # which syncs before it
                durable[0] = done
                cut(0.3)
                ops += 2
            disk.on_call = lambda: None
            store.close()
        for target, least in cuts:
            with millstream.open(target) as store:
                judge(opened(store), least)
            workers.verified(target)
            with millstream.open(target) as store:
                stream = opened(store)
                append(stream, 300)
                stream.compact()
                judge(stream, least)
            shutil.rmtree(target)
        states += len(cuts)
        shutil.rmtree(live)
    workers.report(ops, states, seed)
