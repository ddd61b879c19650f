"""No room: StoreFull, never SIGBUS; nothing is lost, and room makes it work again."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys

import crash_workers as workers
import pytest

import millstream

FULL_MIB = 12


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of a few MiB."""
    workers.need("mount", root=True)
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={FULL_MIB}m", "tmpfs", str(where)], check=True
    )
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def fill(path, history, name, options):
    """Append until the disk is full, say so; when asked, append ten more."""
    account = workers.History(history, name)
    store = millstream.open(path, durability=options.get("durability", "process"))
    stream = store.stream("s", partitions=2, segment_bytes=1 << 18)
    number = 0

    def one():
        nonlocal number
        value = b"%s:%d" % (name.encode(), number)
        account.tried(value)
        number += 1
        position = stream.append(value + b" " + b"x" * 4000, partition=number % 2)
        account.acknowledged(position, value)

    print("open", flush=True)
    while True:
        try:
            one()
        except millstream.StoreFull:
            break
    print("full", flush=True)
    sys.stdin.readline()
    for _ in range(10):
        one()
    print("more", flush=True)
    sys.stdin.readline()
    store.close()


@pytest.mark.root
@pytest.mark.parametrize("durability", ["process", "sync"])
def test_eight_processes_fill_a_disk(small_disk, tmp_path, durability):
    history = tmp_path / "history"
    history.mkdir()
    store = small_disk / "store"
    ballast = small_disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 << 20)
    options = {"durability": durability}
    running = [
        workers.start("test_store_full.fill", str(store), str(history), f"w{i}", options)
        for i in range(8)
    ]
    for one in running:
        assert workers.line(one) == "open"
    for one in running:
        assert workers.line(one) == "full"
    with millstream.open(store, mode="r") as reader:
        assert sum(map(len, reader.stream("s").read())) > 50
    ballast.unlink()
    for one in running:
        one.stdin.write("go on\n")
        one.stdin.flush()
        assert workers.line(one) == "more"
    for one in running:
        assert workers.stop(one) == 0
    records, _ = workers.judge(store, history)
    workers.verified(store)
    workers.report(records, 8, 0)


def test_limit_of_file_size_is_store_full(tmp_path):
    workers.run("test_store_full.limited", str(tmp_path / "store"))
    with millstream.open(tmp_path / "store") as store:
        assert store.stream("s").append(b"x" * 1_000_000).offset > 0
    workers.report(10, 1, 0)


def limited(path):
    """Meet RLIMIT_FSIZE, lift it, go on."""
    with millstream.open(path) as store:
        stream = store.stream("s", segment_bytes=1 << 20)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        stream.append(b"first")
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        for _ in range(5):
            try:
                for _ in range(3):
                    stream.append(b"x" * 400_000)
                raise AssertionError("never full")
            except millstream.StoreFull as error:
                assert error.filename, error
        before = stream.next_offset(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert stream.append(b"x" * 400_000).offset == before


@pytest.mark.root
def test_append_many_says_what_was_stored_before_the_room_ended(small_disk):
    with millstream.open(small_disk / "store", durability="process") as store:
        stream = store.stream("s", partitions=8, segment_bytes=1 << 18)
        keys = [b"%d" % i for i in range(400)]
        values = [b"v" * 2000] * 400
        stored, appended = [], None
        while appended is None:
            try:
                stored += stream.append_many(values, keys=keys)
            except millstream.StoreFull as error:
                appended = error.appended
        total = sum(span.count for span in [*stored, *appended])
        assert sum(map(len, stream.read())) == total
        assert len({span.partition for span in appended}) == len(appended) < 8
    assert not list((small_disk / "store").rglob("*.tmp"))
    with millstream.open(small_disk / "store", mode="r") as store:
        assert sum(map(len, store.stream("s").read())) == total
    workers.report(total, 1, 0)


def fill_up(path):
    """Take every block that is left."""
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.root
@pytest.mark.parametrize("clean", [True, False])
def test_store_on_a_full_disk_opens_and_can_be_emptied(small_disk, clean):
    """Opening took a block for the new store.json, which a full disk does not have: a store that
    was full when it was closed could not even be opened to make room in it."""
    path = small_disk / "store"
    with millstream.open(path) as store:
        stream = store.stream("s", segment_bytes=1 << 18)
        store.stream("other").append(b"x")
        for count in range(1500):
            stream.append(b"%04d" % count * 1000)
        fill_up(small_disk / "ballast")
    if not clean:
        workers.run("test_store_full.open_and_die", str(path))
    for _ in range(2):  # the room for it is not used up by the first time
        with millstream.open(path) as store:
            stream = store.stream("s")
            assert sum(map(len, stream.read())) == 1500
            fill_up(small_disk / "ballast")
    with millstream.open(path) as store:
        stream = store.stream("s")
        stream.alter(retention=millstream.Retention(bytes="1MiB"))
        stream.enforce_retention()  # or the background thread was faster
        assert stream.first_offset(0) > 0
        stream.append_many([b"room again"] * 10)
        store.drop_stream("other")
        assert stream.next_offset(0) == 1510
    workers.verified(path)
    workers.report(1510, 1, 0)


def open_and_die(path):
    """Leave the store unclean."""
    with millstream.open(path):
        sys.stdout.flush()
        os._exit(0)


@pytest.mark.root
def test_retention_makes_room_on_a_disk_that_producers_filled(small_disk):
    path = small_disk / "store"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 18)
        producers = [stream.producer(f"p{i}") for i in range(300)]
        sequence = 0
        with pytest.raises(millstream.StoreFull):
            while True:
                producers[sequence % 300].append(b"x" * 4000, sequence=sequence)
                sequence += 1
        rest = os.open(small_disk / "rest", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while os.write(rest, b"x" * 4096):
                pass
        os.close(rest)
        assert stream.delete_before(millstream.Position(0, 1, sequence)) > 0
        for i in range(10):
            assert producers[i].append(b"again", sequence=i) is None
            assert producers[(sequence + i) % 300].append(b"x", sequence=sequence + i) is not None
        assert stream.producer("new after room").append(b"x", sequence=0) is not None
    with millstream.open(path) as store:
        assert store.stream("s").producer("p7").append(b"again", sequence=7) is None
    workers.verified(path)


def test_a_disk_is_filled_although_the_next_segment_would_be_larger_than_what_is_left(small_disk):
    """Segments double: with 7 of 12 MiB used the next one did not fit, and the rest was lost."""
    with millstream.open(small_disk / "store", durability="process") as store:
        stream = store.stream("s")
        count = 0
        with contextlib.suppress(millstream.StoreFull):
            while True:
                stream.append(b"x" * 8000)
                count += 1
        assert shutil.disk_usage(small_disk).free < 1 << 20
        assert count * 8000 > 9 << 20
        assert sum(map(len, stream.read())) == count
    workers.verified(small_disk / "store")
    workers.report(count, 1, 0)


@pytest.mark.root
def test_sparse_copy_on_a_full_disk_is_store_full_not_sigbus(small_disk, tmp_path):
    workers.need("cp")
    source = tmp_path / "source"
    with millstream.open(source) as store:
        stream = store.stream("s", segment_bytes=4 << 20)
        stream.append_many(
            [b"x" * 1000] * 2500
        )  # the second segment is larger than what is written to it
    copied = small_disk / "copy"
    subprocess.run(["cp", "-r", "--sparse=always", str(source), str(copied)], check=True)
    with open(small_disk / "ballast", "wb") as file, contextlib.suppress(OSError):
        free = shutil.disk_usage(small_disk).free
        os.posix_fallocate(file.fileno(), 0, free - (300 << 10))
    text = workers.run("test_store_full.append_until_full", str(copied))
    (small_disk / "ballast").unlink()
    appended = json.loads(text)
    with millstream.open(copied) as store:
        assert store.stream("s").next_offset(0) == 2500 + appended
        store.stream("s").append(b"again")
    workers.report(2500 + appended, 1, 0)


def append_until_full(path):
    """Append until StoreFull; how many went in."""
    count = 0
    store = millstream.open(path)
    try:
        stream = store.stream("s")
        for count in range(100_000):  # noqa: B007
            stream.append(b"y" * 1000)
    except millstream.StoreFull:
        print(count, flush=True)
    with contextlib.suppress(millstream.StoreFull):
        store.close()


def test_two_thousand_partitions_at_1024_descriptors(tmp_path):
    workers.run("test_store_full.two_thousand", str(tmp_path / "store"))
    workers.report(6000, 0, 0)


def two_thousand(path):
    """Append to and read from two thousand partitions within 1,024 descriptors.

    A batch of each is held at once, while the background syncs what was appended.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    for opening in range(2):
        with millstream.open(path) as store:
            stream = store.stream("s", partitions=2000, segment_bytes=1 << 16)
            for i in range(2000):
                assert stream.append(b"%d" % i, partition=i).offset == opening
            assert sum(map(len, stream.read())) == 2000 * (opening + 1)
            assert len(list(stream.read())) >= 2000
            stream.flush()
            assert stream.stats().records == 2000 * (opening + 1)
