"""A sync that failed: said to who waited, seen by every process, mended by the next first open."""

import errno
import json
import os
import re
import sys

import crash_workers as workers
import pytest

import millstream
from millstream.disk import files


def is_clean(path):
    return json.loads((path / "store.json").read_text())["body"]["clean"]


def fail_syncs(path, fail_from):
    """Append at level sync; from one sync of a segment on, the disk answers EIO."""
    calls = 0
    real = files.sync

    def sync(descriptor, name):
        nonlocal calls
        if name.endswith(".seg") and "00000" in name:
            calls += 1
            if calls >= fail_from:
                raise files.storage_error(OSError(errno.EIO, "injected"), name, "syncing the file")
        real(descriptor, name)

    store = millstream.open(path)
    stream = store.stream("s", partitions=2)
    files.sync = sync
    print("open", flush=True)
    for text in sys.stdin:
        try:
            stream.append(text.strip().encode(), partition=0, durability="sync")
            print("ok", flush=True)
        except millstream.MillstreamError as error:
            print(type(error).__name__, flush=True)
    try:
        store.close()
        print("closed", flush=True)
    except millstream.MillstreamError as error:
        print("close:", type(error).__name__, flush=True)


def test_failed_sync_poisons_the_partition_for_every_process(tmp_path):
    path = tmp_path / "store"
    victim = workers.start("test_failed_sync.fail_syncs", str(path), 4)
    assert workers.line(victim) == "open"
    other = workers.start("append_each_line", str(path), 0, "process")
    elsewhere = workers.start("append_each_line", str(path), 1, "sync")
    assert workers.line(other) == workers.line(elsewhere) == "open"
    answers = [workers.ask(victim, f"{i}") for i in range(5)]
    good = answers.index("Indeterminate")
    assert answers[:good] == ["ok"] * good
    assert good >= 1
    assert set(answers[good + 1 :]) == {"Poisoned"}
    assert workers.ask(other, "x") == "Poisoned"
    assert workers.ask(elsewhere, "x").startswith("ok"), "other partitions go on"
    late = workers.start("append_each_line", str(path), 0, "process")
    assert workers.line(late) == "open"
    assert workers.ask(late, "x") == "Poisoned"
    with millstream.open(path, mode="r") as reader:  # reading goes on
        stream = reader.stream("s")
        assert stream.stats().partitions[0].health == "sync failed"
        assert sum(map(len, stream.read(partition=0))) == good + 1
        assert stream.durable_offset(0) <= good
        assert sum(map(len, stream.read(partition=0, durable=True))) <= good
    for worker in (other, elsewhere, late, victim):
        workers.stop(worker)
    assert not is_clean(path)
    synced = []
    real = files.sync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", lambda fd, name: (synced.append(name), real(fd, name))[1])
        with millstream.open(path) as store:
            stream = store.stream("s")
            assert sum(map(len, stream.read(partition=0))) == good + 1
            assert any("00000/" in name for name in synced), "what is kept is synced anew"
            assert stream.append(b"again", partition=0, durability="sync").epoch == 2
    assert is_clean(path)
    workers.verified(path)
    workers.report(8, 1, 0)


def test_closing_raises_what_failed_only_where_it_was_written(tmp_path):
    """`close` raised Poisoned in every process, also in those that only read."""
    path = tmp_path / "store"
    victim = workers.start("test_failed_sync.fail_syncs", str(path), 4)
    assert workers.line(victim) == "open"
    store = millstream.open(path)
    answers = [workers.ask(victim, f"{i}") for i in range(5)]
    assert {"Indeterminate", "Poisoned"} <= set(answers)
    stored = len(answers) - answers.count("Poisoned")
    assert sum(map(len, store.stream("s").read())) == stored
    store.close()
    assert workers.ask(victim, "x") == "Poisoned"
    out, _ = victim.communicate(timeout=workers.DEADLINE_S)
    assert out.split() == ["close:", "Poisoned"]
    assert not is_clean(path)
    workers.report(stored, 1, 0)


def append_synced(path, count):
    """Append so many records at level sync and print what came of each."""
    from millstream.store.background import Background

    Background.notice = lambda *_: None
    store = millstream.open(path)
    stream = store.stream("s")
    for i in range(count):
        try:
            stream.append(b"%d" % i, durability="sync")
            print("ok", flush=True)
        except millstream.MillstreamError as error:
            print(type(error).__name__, flush=True)
    try:
        store.close()
    except millstream.MillstreamError as error:
        print(type(error).__name__, flush=True)


@pytest.mark.parametrize("function", ["fdatasync"])
def test_real_error_of_the_kernel_poisons(tmp_path, function):
    workers.need("strace")
    faults = 0
    for when in (8, 9, 10, 11):
        path = tmp_path / f"store{when}"
        trace = tmp_path / "trace"
        inject = ("strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={function}")
        inject += ("-e", f"inject={function}:error=EIO:when={when}")
        worker = workers.start("test_failed_sync.append_synced", str(path), 6, prefix=inject)
        text, _ = worker.communicate(timeout=workers.DEADLINE_S)
        answers = text.split()
        failed = re.findall(r"INJECTED", trace.read_text())
        assert len(failed) == 1
        if "Indeterminate" in answers:
            at = answers.index("Indeterminate")
            assert set(answers[at + 1 : 6]) <= {"Poisoned"}
            assert not is_clean(path)
            faults += 1
        with millstream.open(path) as store:
            stream = store.stream("s")
            values = [bytes(v) for batch in stream.read() for v in batch.values]
            assert values == [b"%d" % i for i in range(len(values))]
            assert len(values) >= answers.count("ok")
            assert stream.append(b"after", durability="sync").offset == len(values)
    assert faults >= 2
    workers.report(24, faults, 0)


def test_failed_sync_while_opening_is_an_error_and_the_next_open_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "store"
    worker = workers.start("append_each_line", str(path), 0, "process")
    with millstream.open(path) as store:
        store.stream("s")
    assert workers.line(worker) == "open"
    for i in range(10):
        assert workers.ask(worker, f"{i}") == f"ok {i}"
    workers.kill(worker)

    def refuse(descriptor, name):
        raise files.storage_error(OSError(errno.EIO, "injected"), name, "syncing the file")

    with monkeypatch.context() as patch:
        store = millstream.open(path)
        patch.setattr(files, "sync", refuse)
        with pytest.raises(millstream.StorageError, match=r"syncing|sync"):
            store.stream("s").append(b"x")
    store.close()
    with millstream.open(path) as store:
        stream = store.stream("s")
        assert stream.next_offset(0) == 10
        stream.append(b"10")
    os.stat(path)
    workers.report(11, 1, 0)


def dirty_kib(path):
    """How much of what this process has mapped of a file waits to be written."""
    found = counts = 0
    with open("/proc/self/smaps") as maps:
        for text in maps:
            if "-" in text.split()[0]:
                counts = text.rstrip().endswith(str(path))
            elif counts and text.startswith(("Private_Dirty:", "Shared_Dirty:")):
                found += int(text.split()[1])
    return found


def test_queue_whose_sync_failed_is_written_anew(tmp_path, monkeypatch):
    """After an error the kernel calls the pages clean: a sync that they were not made dirty for
    wrote nothing, and ended well."""
    path = tmp_path / "store"
    real = files.sync

    def fail(descriptor, name):
        real(descriptor, name)  # as after an error, nothing is dirty any more
        raise files.storage_error(OSError(errno.EIO, "injected"), name, "syncing the file")

    with millstream.open(path, durability="sync") as store:
        q = store.queue("q", capacity=500, dead_limit=0)
        ids = q.put_many([b"y" * 50_000] + [b"x" * 100] * 499)
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync", fail)
            with pytest.raises(millstream.Indeterminate):
                q.get(timeout=0).ack()
    seen = {}

    def look(descriptor, name):
        seen.setdefault(os.path.basename(name), dirty_kib(name))
        real(descriptor, name)

    with millstream.open(path) as store:
        monkeypatch.setattr(files, "sync", look)
        q = store.queue("q")
        assert len(q) == len(ids) - 1
        assert seen["slots"] >= 500 * 256 // 1024
        assert seen["blocks"] >= 48
        q.put(b"z")
    workers.report(len(ids), 1, 0)
