"""Real mounts with odd names and contents, in a mount namespace that ends with the test."""

import os
import shutil
import subprocess

import crash_workers as workers
import pytest
from open_copy import copy_open

import millstream
from millstream import inspect
from millstream.cli.bench import describe_machine

NAMESPACE = ("unshare", "--mount")
NAMES = (
    b"latin-\xe9",
    "öäü".encode(),
    "名前".encode(),
    b"a b\tc\nd",
    b"back\\040slash\\",
    b" - ",
    b"#",
)


def mount(kind, target, *options):
    """Mount it in the namespace of this worker."""
    subprocess.run(["mount", "-t", kind, *options, kind, target], check=True)


@pytest.mark.root
def test_kind_of_file_system_is_seen_whatever_mounts_are_called(tmp_path):
    """Names that are not UTF-8 made every open fail; other letters hid what was mounted there."""
    workers.need("unshare", "mount", root=True)
    assert "seen" in workers.run("test_mounts.open_on_odd_mounts", str(tmp_path), prefix=NAMESPACE)


def open_on_odd_mounts(path):
    """Open stores on mounts that are fine and on ones that are not, while all are mounted."""
    made = {}
    for kind in ("ramfs", "tmpfs"):
        for name in NAMES:
            directory = os.path.join(os.fsencode(path), kind.encode() + name)
            os.mkdir(directory)
            mount(kind, directory)
            made[directory] = kind
    for directory, kind in made.items():
        store = directory + b"/store"
        if kind == "tmpfs":
            with millstream.open(store) as opened:
                assert opened.stream("s").append(b"1").offset == 0
        else:
            with pytest.raises(millstream.Unsupported, match="ramfs"):
                millstream.open(store)
    with pytest.raises(millstream.Unsupported, match="devpts"):
        millstream.open("/dev/pts")
    print("seen", flush=True)


@pytest.mark.root
def test_store_needs_no_proc(tmp_path):
    """In a chroot without one each `open` raised a raw FileNotFoundError."""
    workers.need("unshare", "mount", root=True)
    assert "used" in workers.run("test_mounts.use_without_proc", str(tmp_path), prefix=NAMESPACE)


def use_without_proc(path):
    """All that a store has, with nothing in /proc; a kind of file system that is not known."""
    unknown = os.path.join(path, "unknown")
    os.mkdir(unknown)
    mount("ramfs", unknown)
    mount("tmpfs", "/proc")
    assert os.listdir("/proc") == []
    with pytest.raises(millstream.Unsupported, match="file system unknown"):
        millstream.open(unknown)
    where = os.path.join(path, "store")
    with millstream.open(where) as store, millstream.open(where) as other:
        stream, queue = store.stream("s", create=True), store.queue("q", create=True)
        with store.transaction() as transaction:
            transaction.append(stream, b"1", key=b"k")
            transaction.put(queue, b"1")
        stream.flush()
        with stream.consumer(group="g") as consumer, stream.view() as view:
            assert len(consumer.poll(30)) == len(view) == 1
            consumer.commit()
            (member,) = other.stream("s").group("g").members()
            assert "another PID namespace" not in member.process
        other.queue("q").get(timeout=30).ack()
        store.backup(os.path.join(path, "copy"))
        other.drop_stream("s")
        with pytest.raises(millstream.Closed, match="dropped"):
            stream.append(b"2")
    assert inspect.verify(where).ok
    print("used", flush=True)


@pytest.mark.root
def test_root_of_a_fresh_volume_is_an_empty_directory(tmp_path):
    """`lost+found` in it was a reason to refuse it."""
    workers.need("unshare", "mount", "mkfs.ext4", root=True)
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    assert "made" in workers.run(
        "test_mounts.make_a_store_on_a_volume", str(image), str(tmp_path), prefix=NAMESPACE
    )


def make_a_store_on_a_volume(image, path):
    """A store at the root of it; then, over another file, a backup as well."""
    volume = os.path.join(path, "volume")
    os.mkdir(volume, 0o700)
    mount_image(image, volume)
    assert os.listdir(volume) == ["lost+found"]
    with millstream.open(volume) as store:
        assert store.stream("s").append(b"1").offset == 0
    report = inspect.verify(volume)
    assert report.ok
    assert not report.notes, report
    assert describe_machine(volume)["file_system"] == "ext4"
    with millstream.open(volume) as store:
        assert store.streams() == ["s"]
    for name in ("members", "store.json", "reserve"):
        os.unlink(os.path.join(volume, name))
    shutil.rmtree(os.path.join(volume, "streams"))
    with millstream.open(os.path.join(path, "elsewhere")) as store:
        store.stream("s").append(b"1")
        store.backup(volume)
    with millstream.open(volume) as store:
        assert store.stream("s").next_offset(0) == 1
    with open(os.path.join(volume, "holiday.jpg"), "wb"), pytest.raises(millstream.StorageError):
        millstream.open(os.path.join(path, "elsewhere")).backup(volume)
    print("made", flush=True)


def mount_image(image, target):
    """Mount a file in the namespace of this worker."""
    subprocess.run(["mount", "-o", "loop", image, target], check=True)


@pytest.mark.root
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_store_on_a_read_only_mount_is_read_verified_and_backed_up(tmp_path, end):
    """One with transactions could not be backed up."""
    workers.need("unshare", "mount", root=True)
    assert "copied" in workers.run(
        "test_mounts.back_up_what_cannot_be_written", str(tmp_path), end, prefix=NAMESPACE
    )


def back_up_what_cannot_be_written(path, end):
    """Make a store, have it ended in some way, mount it read-only, copy it."""
    made = os.path.join(path, "made")
    with millstream.open(made) as store:
        stream, queue = store.stream("s", partitions=2), store.queue("q", capacity=10)
        queue.put_many([b"1", b"2"])
        for i in range(5):
            with store.transaction() as transaction:
                transaction.append(stream, b"%d" % i, key=b"k%d" % i)
                transaction.put(queue, b"of %d" % i)
        if end == "killed":
            copy_open(made, os.path.join(path, "killed"))
    subject = os.path.join(path, "made" if end == "closed" else "killed")
    subprocess.run(["mount", "--bind", subject, subject], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", subject], check=True)
    with pytest.raises(OSError, match="Read-only"):
        os.mkdir(os.path.join(subject, "x"))
    with pytest.raises(millstream.StorageError):
        millstream.open(subject)
    assert inspect.verify(subject).ok
    copy = os.path.join(path, "copy")
    with millstream.open(subject, mode="r") as store:
        assert store.needs_recovery == (end == "killed")
        assert sum(map(len, store.stream("s").read())) == 5
        assert store.stream("s").stats()
        store.backup(copy)
    with millstream.open(copy) as store:
        assert sum(map(len, store.stream("s").read())) == 5
        assert len(store.queue("q")) == 7
    assert inspect.verify(copy).ok
    print("copied", flush=True)


def test_snapshot_by_hard_links_is_refused_with_what_to_do(tmp_path):
    path, snapshot = tmp_path / "store", tmp_path / "snapshot"
    store = millstream.open(path)
    stream = store.stream("s")
    stream.append(b"1")
    subprocess.run(["cp", "-al", path, snapshot], check=True)
    stream.append(b"2")
    with pytest.raises(millstream.StorageError, match=r"cp -al.*remove the other names"):
        store.close()
    assert store.closed
    store.close()  # it was said
    for one in (path, snapshot):
        (problem,) = inspect.verify(one).problems
        assert (problem.kind, "remove the other names" in problem.advice) == ("linked", True)
        before = [(file.stat().st_mtime_ns, file) for file in sorted(path.rglob("*"))]
        for dry_run in (True, False):
            (action,) = inspect.repair(one, dry_run=dry_run)
            assert action.kind == "cannot"
            assert "remove the other names" in action.text
        assert before == [(file.stat().st_mtime_ns, file) for file in sorted(path.rglob("*"))]
        for mode in ("rw", "r"):
            with pytest.raises(millstream.StorageError, match=r"cp -al.*remove the other names"):
                millstream.open(one, mode=mode)
    shutil.rmtree(snapshot)
    with millstream.open(path) as store:
        assert store.stream("s").append(b"3").offset == 2  # nothing stored is lost
    assert inspect.verify(path).ok
    assert inspect.repair(path) == []


@pytest.mark.root
def test_closed_store_keeps_nothing_of_its_volume(tmp_path):
    """Also while handles of streams are still there: what they mapped or held open is given up."""
    workers.need("unshare", "mount", root=True)
    assert "free" in workers.run("test_mounts.close_and_unmount", str(tmp_path), prefix=NAMESPACE)


def close_and_unmount(path):
    """Use a stream, close, unmount."""
    mount("tmpfs", path)
    for mode in ("rw", "r"):
        store = millstream.open(path, mode=mode)
        stream = store.stream("s")
        if mode == "rw":
            stream.append(b"1")
        assert stream.next_offset(0) == 1
        store.close()
        assert stream.closed
    subprocess.run(["umount", path], check=True)
    print("free", flush=True)
