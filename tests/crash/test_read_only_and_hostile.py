"""Readers change nothing; what was planted in the directory is refused; names are no paths."""

import errno
import hashlib
import os
import random
import shutil
import socket
import stat
import subprocess
import threading
from pathlib import Path

import crash_workers as workers
import pytest

import millstream
from millstream.disk import files


def snapshot(path):
    """Hash, size, mode, mtime and inode of everything."""
    found = {}
    for directory, _, names in os.walk(path):
        for name in [*names, "."]:
            full = os.path.join(directory, name)
            state = os.lstat(full)
            data = b"" if name == "." else Path(full).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            found[full] = (
                digest,
                state.st_size,
                state.st_mode,
                state.st_mtime_ns,
                state.st_ctime_ns,
                state.st_ino,
            )
    return found


def make(path, kind):
    """A store that is clean, was killed, or (returning its writer) lives."""
    with millstream.open(path) as store:
        stream = store.stream("s", partitions=3, segment_bytes=1 << 16)
        for i in range(100):
            stream.append(b"%d " % i + b"v" * 900, partition=0)
            stream.append(b"%d" % i, partition=1)
    if kind == "clean":
        return None
    writer = workers.start("append_each_line", str(path), 0, "process")
    assert workers.line(writer) == "open"
    for i in range(100, 180):
        assert workers.ask(writer, f"{i} " + "v" * 900) == f"ok {i}"
    if kind == "killed":
        workers.kill(writer)
    return writer


def read_all(path):
    """Use everything that a read-only store offers."""
    with millstream.open(path, mode="r") as store:
        stream = store.stream("s")
        found = [
            int(bytes(v).split()[0]) for batch in stream.read(partition=0) for v in batch.values
        ]
        assert sum(map(len, stream.read(partition=1))) == 100
        assert sum(map(len, stream.read(follow=True, timeout=0.02))) == len(found) + 100
        assert stream.next_offset(2) == 0
        assert stream.stats().records == len(found) + 100
        assert stream.offset_at(0, 0) == 0
        for change in (
            lambda: stream.append(b"x"),
            lambda: stream.flush(),
            lambda: stream.enforce_retention(),
            lambda: stream.add_partitions(1),
            lambda: store.drop_stream("s"),
        ):
            try:
                change()
            except millstream.Unsupported:
                continue
            raise AssertionError("a read-only store was changed")
        try:
            store.stream("new")
            raise AssertionError("a stream was created")
        except millstream.NotFound:
            pass
        print(len(found), store.needs_recovery, flush=True)


@pytest.mark.parametrize(("kind", "records"), [("clean", 100), ("killed", 180), ("live", 180)])
def test_reading_changes_no_byte(tmp_path, kind, records):
    path = tmp_path / "store"
    writer = make(path, kind)
    if kind == "live":
        os.kill(writer.pid, 19)  # stopped, so that what changes is our doing
    before = snapshot(path)
    assert (
        workers.run("test_read_only_and_hostile.read_all", str(path))
        == f"{records} {kind == 'killed'}\n"
    )
    assert snapshot(path) == before
    if kind == "live":
        os.kill(writer.pid, 18)
        assert workers.ask(writer, "180") == "ok 180"
        assert workers.stop(writer) == 0
    workers.report(records, 0, 0)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["clean", "killed"])
@pytest.mark.parametrize("how", ["another user", "read-only mount"])
def test_read_only_directory_can_be_read(tmp_path_factory, kind, how):
    workers.need("mount", root=True)
    # Directories of pytest belong to root alone; another user must be able to reach this one.
    path = tmp_path_factory.mktemp("ro") / "store"
    make(path, kind)
    for directory, _, names in os.walk(path):
        os.chmod(directory, 0o555)
        for name in names:
            os.chmod(os.path.join(directory, name), 0o444)
    before = snapshot(path)
    function = "test_read_only_and_hostile.read_all"
    if how == "another user":
        opened = [
            parent for parent in [path.parent, *path.parent.parents] if parent.owner() == "root"
        ]
        modes = [(parent, stat.S_IMODE(parent.stat().st_mode)) for parent in opened]
        try:
            for parent, mode in modes:
                if not mode & stat.S_IXOTH:
                    parent.chmod(mode | stat.S_IXOTH)
            read_all(str(path))  # the other user may not be able to read the package
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.setgid(65534)
                    os.setuid(65534)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    read_all(str(path))
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
        finally:
            for parent, mode in modes:
                parent.chmod(mode)
    else:
        where = path.parent / "mounted"
        where.mkdir()
        subprocess.run(["mount", "--bind", str(path), str(where)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(where)], check=True)
            workers.run(function, str(where))
            with pytest.raises(millstream.StorageError):
                millstream.open(where)
        finally:
            subprocess.run(["umount", "-l", str(where)], check=True)
    assert snapshot(path) == before
    workers.report(100, 0, 0)


# --- permissions and what was planted -------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_files_are_0600_and_directories_0700_whatever_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with millstream.open(tmp_path / "store") as store:
            stream = store.stream("s", partitions=2, segment_bytes=1 << 16)
            stream.append_many([b"x" * 900] * 200, partition=0)
            stream.append_many([b"x" * 900] * 200, partition=0)
            stream.alter(retention=millstream.Retention(age="1d"))
            stream.add_partitions(1)
            store.backup(tmp_path / "backup")
    finally:
        os.umask(before)
    for top in ("store", "backup"):
        for directory, _, names in os.walk(tmp_path / top):
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700, directory
            for name in names:
                assert stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) == 0o600, name


NAMES = [
    "members",
    "store.json",
    "streams/s/stream.json",
    "streams/s/control",
    "streams/s/00000/0000000000000001.seg",
]


@pytest.mark.parametrize("kind", ["symlink", "fifo", "hardlink", "directory", "socket"])
@pytest.mark.parametrize("name", NAMES)
def test_planted_file_is_refused(tmp_path, name, kind):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        store.stream("s").append(b"1")
    target, elsewhere = path / name, tmp_path / "elsewhere"
    shutil.copy(target, elsewhere)
    untouched = elsewhere.read_bytes()
    target.unlink()
    if kind == "symlink":
        target.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(target, 0o600)
    elif kind == "hardlink":
        os.link(elsewhere, target)
    elif kind == "directory":
        target.mkdir()
    else:
        here = os.getcwd()
        os.chdir(target.parent)
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(target.name)
        finally:
            os.chdir(here)
    for mode in ("rw", "r"):
        with pytest.raises(millstream.StorageError), millstream.open(path, mode=mode) as store:
            list(store.stream("s").read())
            store.stream("s").append(b"2")
    assert elsewhere.read_bytes() == untouched
    workers.report(2, 1, 0)


@pytest.mark.parametrize("name", ["streams", "streams/s", "streams/s/00000"])
def test_planted_link_to_a_directory_is_refused(tmp_path, name):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        store.stream("s").append(b"1")
    shutil.move(path / name, tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(millstream.StorageError), millstream.open(path) as store:
        list(store.stream("s").read())
        store.stream("s").append(b"2")


def test_file_systems_are_refused_by_kind(tmp_path, monkeypatch):
    for kind in ("nfs", "nfs4", "cifs", "fuse.sshfs", "9p", "ceph", "unknown"):
        monkeypatch.setattr(files, "file_system", lambda _, kind=kind: kind)
        with pytest.raises(millstream.Unsupported, match=kind):
            millstream.open(tmp_path / "store")
    for kind in files.COPY_ON_WRITE:
        monkeypatch.setattr(files, "file_system", lambda _, kind=kind: kind)
        with pytest.raises(millstream.Unsupported, match="copies on write"):
            millstream.open(tmp_path / "store")
    millstream.open(tmp_path / "store", force=True).close()
    for kind in files.LOCAL:
        monkeypatch.setattr(files, "file_system", lambda _, kind=kind: kind)
        millstream.open(tmp_path / "store").close()


def test_real_file_system_that_is_not_a_disk_is_refused():
    assert files.file_system("/proc") == "proc"
    assert files.file_system("/sys") == "sysfs"
    with pytest.raises((millstream.Unsupported, millstream.StorageError)):
        millstream.open("/proc/self")


@pytest.mark.root
def test_store_that_may_not_be_looked_at_is_not_called_missing(tmp_path):
    """Opening it with mode="r" said that there was no store, and to create one."""
    path = tmp_path / "store"
    with millstream.open(path) as store:
        store.stream("s")
    answer = workers.run("test_read_only_and_hostile.open_as_nobody", str(path))
    assert answer.split() == ["StorageError", str(errno.EACCES)]


def open_as_nobody(path):
    """Say what opening raises without the right to look into the directory."""
    opening = millstream.open  # imported now: nobody may not read what root installed for itself
    os.setuid(65534)
    try:
        opening(path, mode="r")
    except millstream.StorageError as error:
        print(type(error).__name__, error.errno, flush=True)


def hostile_names():
    dice = random.Random(1)
    bad = [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/",
        "/etc",
        "../x",
        "a/../b",
        "a\0b",
        "a\nb",
        "a b",
        "ü",
        "ＡＢ",
        "а",
        "\u202e",
    ]
    bad += [
        "a" * 129,
        "a" * 4096,
        "con:",
        "a*",
        "a?",
        "a\\b",
        "~",
        "$HOME",
        "%2e%2e",
        "a;b",
        "'",
        '"',
        "`x`",
        "\x7f",
        "\x1b[0m",
    ]
    alphabet = "/.\0 ~\\*?:|<>\"'`$&;()[]{}!#%^+=,@\n\t\rü€\U0001f600\ud800"
    while len(bad) < 200:
        bad.append("".join(dice.choice(alphabet) for _ in range(dice.randrange(1, 12))))
    return bad


def test_hostile_names_never_become_paths(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        store.stream("ok")
        before = snapshot(tmp_path)
        tried = hostile_names()
        assert len(tried) >= 200
        for name in tried:
            for use in (store.stream, store.drop_stream):
                with pytest.raises(millstream.InvalidArgument):
                    use(name)
        for name in (None, 1, b"bytes", ["x"], tmp_path):
            with pytest.raises(millstream.InvalidType):
                store.stream(name)
        assert snapshot(tmp_path).keys() == before.keys()
        for name in ("a", "A.b-c_1", "-", "_", "0", "x" * 128, "a.tmp"):
            store.stream(name)
            assert (path / "streams" / name).is_dir()
    workers.report(len(tried), len(tried), 1)


def test_directory_that_everybody_can_write_is_refused(tmp_path):
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(millstream.Unsupported, match="every user"):
        millstream.open(path)
    path.chmod(0o1777)
    millstream.open(path).close()
    assert threading.active_count() < 10
