"""Each file call of a queue fails once, and the disk is full: said clearly, and nothing is lost."""

import contextlib
import errno
import gc
import os
import shutil
import sys

import crash_workers as workers
import pytest
from test_store_full import fill_up, small_disk  # noqa: F401

import millstream
from millstream.disk import files

CALLS = (
    "open_file", "read", "write", "allocate", "extend", "map_file", "sync", "_sync_directory",
    "rename", "remove", "names", "lock", "make_directory", "require_directory", "remove_tree",
)  # fmt: skip
OPTIONS = {"capacity": 1500, "dead_limit": 10, "payload_bytes": 700 * 4096, "durability": "sync"}


class Faults:
    """Lets one call of `millstream.disk.files` fail, by its number."""

    def __init__(self, monkeypatch, at, number):
        self.at, self.number, self.count, self.hit = at, number, 0, ""
        self.armed = False
        for name in CALLS:
            monkeypatch.setattr(files, name, self.wrapped(name, getattr(files, name)))

    def wrapped(self, name, function):
        def call(*arguments, **options):
            self.count += self.armed
            if self.armed and self.count == self.at:
                self.hit = name
                path = next((one for one in arguments if isinstance(one, str)), "?")
                raise files.storage_error(OSError(self.number, "injected"), path, name)
            return function(*arguments, **options)

        return call


class Work:
    """What was put and acknowledged for certain, and what may have been."""

    def __init__(self, path):
        self.path = path
        self.tried, self.put, self.gone, self.maybe_gone = [], set(), set(), set()
        self.errors = []

    def attempt(self, call):
        """A call, and once more where it failed; None where it failed both times."""
        for _ in range(2):
            try:
                return call()
            except millstream.MillstreamError as error:
                assert str(self.path.parent) in str(error), error
                self.errors.append(error)
        return None

    def add(self, q, size, count=1):
        values = [b"%06d" % (len(self.tried) + i) * (size // 6) for i in range(count)]
        self.tried += values
        before = len(self.errors)
        ids = self.attempt(lambda: q.put_many(values))
        if ids is not None and len(self.errors) == before:
            assert len(ids) == count or self.errors  # what failed may be there, and take room
            self.put.update(values[: len(ids)])

    def finish(self, q):
        m = self.attempt(lambda: q.get(timeout=0))
        if m is None:
            return
        self.maybe_gone.add(m.value)
        with contextlib.suppress(millstream.LeaseLost):
            self.attempt(m.ack)
        if m.finished == "ack" and not self.errors:
            self.gone.add(m.value)

    def run(self, faults):
        store = millstream.open(self.path)
        faults.armed = True
        for first in (True, False):
            self.session(store, first)
            store = self.attempt(lambda: millstream.open(self.path))
            if store is None:
                return
        faults.armed = False
        store.close()

    def session(self, store, first):
        q = self.attempt(lambda: store.queue("q", **OPTIONS))
        if q is not None:
            self.add(q, 12, 3)
            self.finish(q)
            if first:
                self.add(q, 9000)
                self.add(q, 12, 1100)  # slots grow
                for _ in range(3):
                    self.add(q, 900_000)  # blocks grow
            self.finish(q)
            self.finish(q)
        try:
            store.close()
        except millstream.MillstreamError as error:
            self.errors.append(error)
            store.close()

    def judge(self):
        for _ in range(2):
            with millstream.open(self.path) as store:
                q = store.queue("q", **OPTIONS)
                q._check()
                there = [m.value for m in q.peek(10_000)]
                assert len(q.dead) == 0
                assert len(set(there)) == len(there) or self.errors, "twice"
                assert set(there) <= set(self.tried)
                assert self.put - self.maybe_gone <= set(there), "lost"
                assert not self.gone & set(there), "acknowledged, and back"
                free = OPTIONS["capacity"] - len(q)
                assert len(q.put_many([b"-"] * 2000)) == free
                assert q.purge() == OPTIONS["capacity"]
                self.tried, self.put = [], set()
        assert millstream.inspect.verify(self.path).problems == []
        below = os.walk(self.path / "queues")
        left = [name for _, names, more in below for name in (*names, *more)]
        assert not [name for name in left if name.endswith((".tmp", ".dropped"))], left


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE])
def test_each_file_call_fails_once(memory_directory, monkeypatch, number):
    ops = faults = 0
    said, hits = set(), set()
    calls = range(1, 1000) if os.environ.get("MILLSTREAM_FULL") else range(1 + number % 3, 1000, 3)
    for at in calls:
        path = memory_directory / f"store{at}"
        with monkeypatch.context() as patch:
            injected = Faults(patch, at, number)
            work = Work(path)
            work.run(injected)
        if not injected.hit:
            break
        faults += 1
        hits.add(injected.hit)
        ops += len(work.tried)
        said |= {type(error).__name__ for error in work.errors}
        try:
            work.judge()
        except BaseException:
            print(f"call {at}: {injected.hit}; {work.errors}")
            raise
        shutil.rmtree(path)
    assert faults > 50
    assert {"write", "sync", "_sync_directory"} <= hits
    if number == errno.ENOSPC:
        assert "StoreFull" in said
    assert said <= {"StoreFull", "StorageError", "Indeterminate", "Poisoned", "LeaseLost"}, said
    workers.report(ops, faults, 0)


def fill_and_empty(disk):
    """Put until the disk is full, and acknowledge then; how many messages are left."""
    with millstream.open(disk / "store", durability="sync") as store:
        q = store.queue("q", capacity=20_000, slot_bytes=1024, payload_bytes="32MiB", priorities=1)
        put = 0
        with pytest.raises(millstream.StoreFull) as failed:
            while True:
                q.put(b"x" * 600)
                put += 1
        assert failed.value.filename.endswith("slots")
        assert shutil.disk_usage(disk).free < 2 << 20, "what is left holds an extent"
        fill_up(disk / "ballast")
        with pytest.raises(millstream.StoreFull) as failed:
            q.put(b"y" * 10_000)
        assert failed.value.filename.endswith(("blocks", "slots"))
        assert len(q) == put
        for _ in range(50):
            q.get(timeout=0).ack()
        q.get(timeout=0).nack(delay=0)
        q.get_many(1, timeout=0)[0].reject("no")
        assert len(q.put_many([b"z"] * 50)) == 50, "what was acknowledged left room"
        q._check()
    return put - 1


def open_once(disk, left):
    """Open the queue on the full disk, and fill what room there was meanwhile."""
    with millstream.open(disk / "store") as store:
        q = store.queue("q")
        assert len(q) == left
        q.get(timeout=0).release()
        fill_up(disk / "ballast")


@pytest.mark.root
def test_full_disk_refuses_puts_and_takes_acknowledgements(small_disk):  # noqa: F811
    with open(small_disk / "room", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 << 20)
    left = fill_and_empty(small_disk)
    gc.collect()  # as another process, which has no map of the last session's hints
    for _ in range(2):
        open_once(small_disk, left)
        gc.collect()
    (small_disk / "room").unlink()
    with millstream.open(small_disk / "store") as store:
        q = store.queue("q")
        q.put(b"y" * 10_000)
        assert len(q.put_many([b"w"] * 900)) == 900
        q._check()
    workers.verified(small_disk / "store")
    workers.report(left, 4, 0)


def fail_queue_syncs(path, fail_from):
    """Put each line at level sync; from one sync of the slots on, the disk answers EIO."""
    calls = 0
    real = files.sync

    def sync(descriptor, name):
        nonlocal calls
        calls += name.endswith("slots")
        if name.endswith("slots") and calls >= fail_from:
            raise files.storage_error(OSError(errno.EIO, "injected"), name, "syncing the file")
        real(descriptor, name)

    store = millstream.open(path, durability="sync")
    q = store.queue("q")
    files.sync = sync
    print("open", flush=True)
    for text in sys.stdin:
        try:
            print("ok", q.put(text.strip().encode()), flush=True)
        except millstream.MillstreamError as error:
            print(type(error).__name__, flush=True)
    with contextlib.suppress(millstream.MillstreamError):
        store.close()


def test_failed_sync_of_one_process_stops_all_until_they_have_closed(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path, durability="process") as store:
        q = store.queue("q")
        victim = workers.start("test_queue_faults.fail_queue_syncs", str(path), 3)
        assert workers.line(victim) == "open"
        answers = [workers.ask(victim, f"{i}").split()[0] for i in range(4)]
        assert answers == ["ok", "ok", "Indeterminate", "Poisoned"]
        m = None
        for call in (lambda: q.put(b"x"), lambda: q.get(timeout=0), q.flush, q.purge):
            with pytest.raises(millstream.Poisoned, match="sync failed"):
                m = call()
        assert m is None
        assert [one.value for one in q.peek(5)] == [b"0", b"1", b"2"], "looking goes on"
        workers.stop(victim)
    with millstream.open(path) as store:
        assert not store.session.clean
        q = store.queue("q")
        assert [m.value for m in q.get_many(5, timeout=0)] == [b"0", b"1", b"2"]
    workers.verified(path)
    workers.report(7, 1, 0)
