"""A store into allocated space must need no block, whatever shares it: StoreFull, never SIGBUS.

Each on a small volume of its own, in a mount namespace that ends with the test.
"""

import contextlib
import os
import subprocess

import crash_workers as workers
import pytest

import millstream
from millstream import inspect

NAMESPACE = ("unshare", "--mount")
SMALLEST = {"btrfs": 130 << 20, "ext4": 32 << 20, "xfs": 330 << 20}


def volume(path, kind, *options):
    """Make a file system in a file, and mount it; where."""
    where = os.path.join(path, kind)
    if kind == "tmpfs":
        os.mkdir(where)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", where], check=True)
        return where
    with open(f"{where}.image", "wb") as file:
        file.truncate(SMALLEST[kind])
    subprocess.run([f"mkfs.{kind}", "-q", *options, f"{where}.image"], check=True)
    os.mkdir(where)
    subprocess.run(["mount", "-o", "loop", f"{where}.image", where], check=True)
    return where


def overlay(path, upper):
    """Mount an overlay whose upper layer lies on a volume, named as from its directory; where."""
    for name in ("upper", "work"):
        os.mkdir(os.path.join(upper, name))
    where, lower = os.path.join(path, "merged"), os.path.join(path, "lower")
    os.mkdir(where)
    os.mkdir(lower)
    layers = f"lowerdir={lower},upperdir=upper,workdir=work"
    command = ["mount", "-t", "overlay", "-o", layers, "overlay", where]
    subprocess.run(command, check=True, cwd=upper)
    return where


def fill_up(path):
    """Leave no block."""
    for size in (1 << 20, 1 << 16, 4096):
        with contextlib.suppress(OSError), open(f"{path}/ballast{size}", "ab", buffering=0) as file:
            while True:
                file.write(os.urandom(size))
    os.sync()


def need(kind):
    """Skip where there is no such file system."""
    workers.need("unshare", "mount", *([] if kind == "tmpfs" else [f"mkfs.{kind}"]), root=True)
    with open("/proc/filesystems", encoding="ascii") as file:
        if f"\t{kind}\n" not in file.read():
            pytest.skip(f"this kernel has no {kind}")


@pytest.mark.root
@pytest.mark.parametrize("kind", ["btrfs", "ext4", "tmpfs", "xfs"])
def test_overlay_is_judged_by_the_layer_that_is_written_to(tmp_path, kind):
    """One over Btrfs passed, and an append after a snapshot died of SIGBUS on the full disk."""
    need(kind)
    text = workers.run("test_copy_on_write.open_layered", str(tmp_path), kind, prefix=NAMESPACE)
    assert "judged" in text


def open_layered(path, kind):
    """Open a store where it is fine, and where it is not."""
    upper = volume(path, kind)
    store = os.path.join(overlay(path, upper), "store")
    if kind == "btrfs":
        with pytest.raises(millstream.Unsupported, match="upper layer.*copies on write"):
            millstream.open(store)
    for _ in range(2):
        with millstream.open(store, force=kind == "btrfs") as opened:
            opened.stream("s").append(b"1")
    assert not [name for name in os.listdir(store) if name.endswith(".tmp")]
    with millstream.open(store, mode="r") as opened:
        assert sum(map(len, opened.stream("s").read())) == 2
    if kind != "btrfs":
        fill_up(upper)
        with millstream.open(store) as opened:  # asking takes room, which the reserve has
            assert sum(map(len, opened.stream("s").read())) == 2
    print("judged", flush=True)


@pytest.mark.root
def test_store_whose_blocks_a_copy_shares_is_store_full_not_sigbus(tmp_path):
    """`cp` on XFS shares blocks (a reflink): each store into one needs another."""
    need("xfs")
    workers.need("cp")
    text = workers.run("test_copy_on_write.share", str(tmp_path), prefix=NAMESPACE)
    assert "shared" in text


def share(path):
    """Copy a closed store by a reflink; fill the disk; store into all that is mapped; make room."""
    where = volume(path, "xfs", "-m", "reflink=1")
    store, copy = os.path.join(where, "store"), os.path.join(where, "copy")
    with millstream.open(store) as opened:
        opened.stream("s", segment_bytes=8 << 20).append_many([b"x" * 1000] * 2000)
        opened.queue("q", capacity=100, payload_bytes="1MiB").put_many([b"y" * 5000] * 50)
        with opened.transaction() as transaction:
            transaction.append(opened.stream("s"), b"x" * 1000)
        with opened.stream("s").consumer(group="g", max_records=10) as consumer:
            consumer.poll()
            consumer.commit()
    subprocess.run(["cp", "-a", "--reflink=always", store, copy], check=True)
    os.sync()
    with millstream.open(store) as opened:
        stream, queue = opened.stream("s"), opened.queue("q")
        group = stream.group("g")
        fill_up(where)
        before, count = stream.next_offset(0), 0
        for _ in range(3):
            with contextlib.suppress(millstream.StoreFull):
                while True:
                    stream.append(b"x" * 1000)
                    count += 1
        with contextlib.suppress(millstream.StoreFull):
            for _ in range(40):
                queue.put(b"y" * 5000)
        for _ in range(10):
            queue.get(timeout=0).ack()
        group.seek("earliest")
        with contextlib.suppress(millstream.Indeterminate), opened.transaction() as transaction:
            transaction.append(stream, b"x" * 1000)
        for name in os.listdir(where):
            if name.startswith("ballast"):
                os.unlink(os.path.join(where, name))
        os.sync()
        with opened.transaction() as transaction:
            transaction.append(stream, b"again")
        assert stream.next_offset(0) == before + count + 2
    for one in (store, copy):
        assert inspect.verify(one).ok
    with millstream.open(copy) as opened:
        assert opened.stream("s").next_offset(0) == before
    print("shared", flush=True)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_store_on_a_full_volume_opens_and_can_be_emptied(tmp_path, kind, end):
    """XFS wants free blocks to allocate what has its blocks: `members` could not be opened."""
    need(kind)
    text = workers.run("test_copy_on_write.empty", str(tmp_path), kind, end, prefix=NAMESPACE)
    assert "emptied" in text


def empty(path, kind, end):
    """Fill the disk around a store; open it, make room, append."""
    where = volume(path, kind)
    store = os.path.join(where, "store")
    with millstream.open(store) as opened:
        stream = opened.stream("s", segment_bytes=1 << 18)
        for _ in range(1500):
            stream.append(b"x" * 1000)
        with opened.transaction() as transaction:
            transaction.append(opened.stream("other"), b"1")
    fill_up(where)
    if end == "killed":
        workers.run("test_store_full.open_and_die", store)
    for _ in range(2):
        with millstream.open(store) as opened:
            assert sum(map(len, opened.stream("s").read())) == 1500
        fill_up(where)
    with millstream.open(store) as opened:
        stream = opened.stream("s")
        stream.alter(retention=millstream.Retention(bytes="300KiB"))
        stream.enforce_retention()
        assert stream.first_offset(0) > 0
        assert stream.append(b"again").offset == 1500
    assert inspect.verify(store).ok
    print("emptied", flush=True)


@pytest.mark.root
def test_hole_that_the_count_of_blocks_hides_is_filled(tmp_path):
    """ext4 counts its own block, of a file with many extents, as one of the file's."""
    need("ext4")
    workers.need("fallocate")
    text = workers.run("test_copy_on_write.hide_a_hole", str(tmp_path), prefix=NAMESPACE)
    assert "filled" in text


def hide_a_hole(path):
    """Have a segment with a hole where it will be appended to, and as many blocks as it is long."""
    where = volume(path, "ext4", "-b", "4096")
    store = os.path.join(where, "store")
    with millstream.open(store) as opened:
        opened.stream("s", segment_bytes=1 << 20).append(b"x")
    (segment,) = (
        os.path.join(root, name)
        for root, _, names in os.walk(os.path.join(store, "streams", "s"))
        for name in names
        if name.endswith(".seg")
    )
    with open(segment, "r+b") as file:
        for page in range(100, 120, 2):  # zeros as before, but written, so extents of their own
            os.pwrite(file.fileno(), bytes(4096), page * 4096)
        os.fsync(file.fileno())
    subprocess.run(
        ["fallocate", "--punch-hole", "--offset", str(130 * 4096), "--length", "4096", segment],
        check=True,
    )
    os.sync()
    found = os.stat(segment)
    assert found.st_blocks * 512 >= found.st_size
    with millstream.open(store) as opened:
        stream, count = opened.stream("s"), 0
        fill_up(where)
        with contextlib.suppress(millstream.StoreFull):
            while True:
                stream.append(b"y" * 1000)
                count += 1
        assert stream.next_offset(0) == 1 + count
    print("filled", flush=True)
