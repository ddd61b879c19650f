"""Stores: creating, joining, refusing, leaving."""

import gc
import json
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import xxhash
from timing import until

import millstream
from millstream import (
    Closed,
    CorruptBatch,
    InvalidArgument,
    InvalidType,
    NotFound,
    StorageError,
    StoreFull,
    Unsupported,
    VersionMismatch,
)
from millstream.disk import files
from millstream.log import segment_file, settings


def tree(path):
    return {
        str(p.relative_to(path)): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in sorted(path.rglob("*"))
    }


def write_config(path, **changes):
    """Change a configuration file, with the right checksum."""
    body = {**json.loads(path.read_text())["body"], **changes}
    body = {name: value for name, value in body.items() if value is not ...}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    checksum = f"{xxhash.xxh3_64_intdigest(text.encode()):016x}"
    path.write_text(json.dumps({"body": body, "checksum": checksum}))


@pytest.fixture
def closed(tmp_path):
    """The directory of a store with a stream, cleanly closed."""
    with millstream.open(tmp_path / "s") as store:
        store.stream("s", partitions=2).append(b"x", partition=0)
    return tmp_path / "s"


# --- creating -------------------------------------------------------------------------------------


def test_directory_and_those_above_it_are_made_for_us_alone(tmp_path):
    umask = os.umask(0)
    try:
        with millstream.open(tmp_path / "a" / "b" / "c") as store:
            store.stream("s").append(b"x")
            for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
                mode = stat.S_IMODE(path.lstat().st_mode)
                assert mode == (0o700 if path.is_dir() else 0o600), path
    finally:
        os.umask(umask)


def test_path_may_be_str_bytes_or_path_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("s", b"s", Path("s"), "./x/../s", str(tmp_path / "s"), "s/"):
        with millstream.open(path) as store:
            assert store.path == str(tmp_path / "s")
            store.stream("s")
    assert sorted(os.listdir(tmp_path)) == ["s"]
    millstream.open("ümlaut ☃").close()
    with pytest.raises(InvalidType):
        millstream.open(5.5)
    with pytest.raises(InvalidType):
        millstream.open(None)
    for wrong in ("", "a\0b"):
        with pytest.raises(InvalidArgument):
            millstream.open(wrong)


def test_store_may_lie_behind_a_link(tmp_path):
    """A linked directory was called no directory."""
    (tmp_path / "disk").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with millstream.open(tmp_path / "link") as store:
        store.stream("s").append(b"x")
        with millstream.open(tmp_path / "disk") as other:
            assert other.stream("s").append(b"y").offset == 1


@pytest.mark.parametrize("mode", ["w", "a", "", None, 5, "rw+"])
def test_unknown_mode_is_refused(tmp_path, mode):
    with pytest.raises(InvalidArgument, match="mode"):
        millstream.open(tmp_path / "s", mode=mode)
    assert not (tmp_path / "s").exists()


def test_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "s"):
        with pytest.raises(StorageError) as caught:
            millstream.open(path)
        assert str(tmp_path / "file") in str(caught.value)
        with pytest.raises(NotFound):
            millstream.open(path, mode="r")
    assert (tmp_path / "file").read_text() == "x"


def test_directory_of_others_is_refused(tmp_path):
    (tmp_path / "photos").mkdir(0o700)
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(StorageError, match=r"not empty.*cat\.jpg"):
        millstream.open(tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


def test_directory_that_everyone_can_write_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o777)
    with pytest.raises(Unsupported, match="chmod"):
        millstream.open(tmp_path / "s")
    millstream.open(tmp_path / "s", force=True).close()


def test_proc_is_no_place_for_a_store():
    with pytest.raises((Unsupported, StorageError)):
        millstream.open("/proc/millstream")


# --- damaged and newer ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["store.json", "streams/s/stream.json"])
@pytest.mark.parametrize("mode", ["rw", "r"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", '{"body": {}, "checksum": ""}', "\0" * 100, "{" * 100_000]
)
def test_damaged_configuration_is_corrupt_and_left_alone(closed, name, mode, text):
    (closed / name).write_text(text)
    with pytest.raises(CorruptBatch) as caught, millstream.open(closed, mode=mode) as store:
        store.stream("s")
    assert caught.value.path == str(closed / name)
    assert (closed / name).read_text() == text


@pytest.mark.parametrize("name", ["store.json", "streams/s/stream.json"])
def test_flipped_digit_is_found_by_the_checksum(closed, name):
    text = (closed / name).read_text()
    at = text.index('"format": 1') if name == "store.json" else text.index("134217728")
    (closed / name).write_text(text[:at] + text[at:].replace("1", "3", 1))
    with pytest.raises(CorruptBatch, match="checksum") as caught, millstream.open(closed) as store:
        store.stream("s")
    assert caught.value.expected != caught.value.found


@pytest.mark.parametrize("name", ["store.json", "streams/s/stream.json"])
@pytest.mark.parametrize("mode", ["rw", "r"])
def test_newer_format_is_refused_and_named(closed, name, mode):
    write_config(closed / name, format=2, something="new")
    before = (closed / name).read_bytes()
    with (
        pytest.raises(VersionMismatch, match=r"format 2.*format 1"),
        millstream.open(closed, mode=mode) as store,
    ):
        store.stream("s")
    assert (closed / name).read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"store_id": ...},
        {"store_id": "xyz"},
        {"store_id": 5},
        {"generation": None},
        {"generation": ...},
        {"durability": "fast"},
        {"clean": ...},
    ],
)
def test_configuration_without_what_it_must_have_is_corrupt(closed, changes):
    write_config(closed / "store.json", **changes)
    for mode in ("rw", "r"):
        with pytest.raises(CorruptBatch):
            millstream.open(closed, mode=mode)


def test_store_json_that_is_gone_is_not_made_anew_over_streams(closed):
    (closed / "store.json").unlink()
    with pytest.raises(StorageError, match="no store and is not empty"):
        millstream.open(closed)
    with pytest.raises(NotFound):
        millstream.open(closed, mode="r")


# --- read-only ------------------------------------------------------------------------------------


def test_read_only_store_changes_no_byte(closed, tmp_path):
    before = tree(closed)
    with millstream.open(closed, mode="r") as store:
        stream = store.stream("s")
        assert [v for batch in stream.read() for v in batch.values] == [b"x"]
        assert not store.writable
        assert not store.needs_recovery
        stats = stream.stats()
        assert (stats.records, stream.next_offset(0)) == (1, 1)
        assert list(stream.read(follow=True, timeout=0.05, start="latest")) == []
        position = millstream.Position(0, 1, 0)
        for call in (
            lambda: stream.append(b"x"),
            lambda: stream.append(b"x", key=b"k"),
            lambda: stream.append(b"x", partition=0),
            lambda: stream.append(b"x", partition=1),
            lambda: stream.append_many([b"x"]),
            lambda: stream.append_many([b"x"] * 9, keys=[b"%d" % i for i in range(9)]),
            stream.flush,
            stream.alter,
            stream.enforce_retention,
            lambda: stream.add_partitions(1),
            lambda: stream.delete_before(position),
            lambda: store.drop_stream("s"),
            store.flush,
        ):
            with pytest.raises(Unsupported, match="read-only"):
                call()
        stream.wait_durable(position)
        with pytest.raises(NotFound):
            store.stream("new")
        store.backup(tmp_path / "copy")
    assert tree(closed) == before
    with millstream.open(tmp_path / "copy") as copy:
        assert copy.stream("s").next_offset(0) == 1


def test_read_only_beside_a_writer_sees_what_comes(tmp_path):
    """An append through a map that could only be read ended the process by a signal."""
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", partitions=2)
        stream.append(b"1", partition=0)
        with millstream.open(tmp_path / "s", mode="r") as readonly:
            reader = readonly.stream("s")
            follow = reader.read(follow=True, timeout=20)
            assert list(next(follow).values) == [b"1"]
            for _ in range(3):
                with pytest.raises(Unsupported):
                    reader.append(b"x")
            timer = threading.Timer(0.05, stream.append, [b"2"], {"partition": 1})
            timer.start()
            assert list(next(follow).values) == [b"2"]
            timer.join()
            stream.add_partitions(1)
            stream.append(b"3", partition=2)
            assert list(next(follow).values) == [b"3"]
            assert not readonly.needs_recovery


def test_read_only_needs_a_store(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotFound, match="no store"):
            millstream.open(path, mode="r")
    assert list(tmp_path.iterdir()) == []


# --- streams --------------------------------------------------------------------------------------


def test_streams_are_listed_and_dropped(store):
    for name in ("b", "a", "A.b_c-1", "x" * 128, "9"):
        store.stream(name)
    assert store.streams() == sorted(["b", "a", "A.b_c-1", "x" * 128, "9"])
    store.drop_stream("b")
    assert "b" not in store.streams()
    with pytest.raises(NotFound):
        store.drop_stream("b")
    assert store.stream("b").append(b"again").offset == 0


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".x", "a/b", "../x", "/etc", "a\0b", "a b", "ü", "x" * 129, "a\n", "-\t"],
)
def test_hostile_names_never_become_paths(store, name):
    before = tree(Path(store.path))
    for call in (store.stream, store.drop_stream):
        with pytest.raises(InvalidArgument):
            call(name)
    assert tree(Path(store.path)) == before


@pytest.mark.parametrize("name", [None, 5, b"s", Path("s"), ["s"]])
def test_names_are_text(store, name):
    for call in (store.stream, store.drop_stream):
        with pytest.raises(InvalidType):
            call(name)


def test_a_limit_of_the_size_of_files_is_said(tmp_path):
    """It said to free some room, of which there was enough."""
    with millstream.open(tmp_path / "s") as store:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
            with pytest.raises(StoreFull, match=r"ulimit -f"):
                store.queue("q")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert store.queue("q", create=True).put(b"x") > 0


def test_a_name_that_is_made_this_moment_is_not_the_one_that_was_meant():
    error = settings.missing("store", "group", "g", ["f", "g"])
    assert "There is 'f'." in str(error)


@pytest.mark.parametrize("kind", ["stream", "queue"])
def test_drop_ends_although_others_make_and_remove_files_in_it(store, kind, monkeypatch):
    """An appender publishes a segment, say, and has not come to see that it was dropped."""
    getattr(store, kind)("x", create=True)
    if kind == "stream":
        store.stream("x").append(b"1")
    where = Path(store.path, f"{kind}s")
    names, met = files.names, []

    def beside(path):
        found = names(path)
        if ".dropped" in path and len(met) < 4 and found:
            met.append(path)
            other = os.path.join(path, found[0])
            if not os.path.isdir(other):
                os.unlink(other)
            Path(path, f"late{len(met)}").write_bytes(b"")
        return found

    monkeypatch.setattr(files, "names", beside)
    getattr(store, f"drop_{kind}")("x")
    assert met
    assert [name for name in os.listdir(where) if name.startswith(".")] == []


@pytest.mark.parametrize("who", ["itself", "another"])
def test_handle_of_what_was_dropped_says_so_each_time(store, who):
    """The second call said to open the store again, which was open."""
    stream, queue = store.stream("s", create=True), store.queue("q", create=True)
    reading, position = stream.read(follow=True), stream.append(b"x", key=b"k")
    next(reading)
    with millstream.open(store.path) as other:
        dropper = store if who == "itself" else other
        dropper.drop_stream("s")
        dropper.drop_queue("q")
    for _ in range(2):
        for call in (
            lambda: stream.append(b"x"), lambda: stream.next_offset(0), lambda: next(reading),
            stream.stats, stream.view, lambda: stream.consumer(group="g"),
            lambda: stream.wait_durable(position), lambda: queue.put(b"x"), lambda: len(queue),
            lambda: queue.get(timeout=0), queue.stats, queue.peek,
        ):  # fmt: skip
            with pytest.raises((Closed, StopIteration)) as raised:
                call()
            assert raised.type is StopIteration or "dropped" in str(raised.value)
    store.close()
    with pytest.raises(Closed, match="closed"):
        store.stream("s")


def test_append_that_meets_a_drop_says_that_it_was_dropped(store, monkeypatch):
    """It said that a file of it was not there."""
    with millstream.open(store.path) as other:
        for durability in ("process", "sync"):
            stream = store.stream("s", create=True)
            assert stream.next_offset(0) == 0
            make = segment_file.make

            def drop_first(*arguments, make=make, **options):
                monkeypatch.setattr(segment_file, "make", make)
                other.drop_stream("s")
                make(*arguments, **options)

            monkeypatch.setattr(segment_file, "make", drop_first)
            with pytest.raises(Closed, match="dropped"):
                stream.append(b"x", durability=durability)
            assert store.streams() == []


def test_dropping_frees_the_space_here(tmp_path):
    def mapped():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return sum(str(tmp_path) in line and ".seg" in line for line in maps)

    with millstream.open(tmp_path / "s") as store, millstream.open(tmp_path / "s") as other:
        for _ in range(3):
            stream, theirs = store.stream("s"), other.stream("s")
            stream.append(bytes(10_000))
            assert theirs.next_offset(0) == 1
            assert sum(len(batch) for batch in theirs.read()) == 1
            store.drop_stream("s")
            with pytest.raises(Closed, match="dropped"):
                theirs.append(b"x")
            with pytest.raises(Closed, match="dropped"):
                theirs.stats()
            until(lambda: mapped() == 0)  # the background may be syncing it at this moment
            assert os.listdir(tmp_path / "s" / "streams") == []


# --- closing --------------------------------------------------------------------------------------


def test_temporary_goes_when_closed():
    store = millstream.temporary()
    path = store.path
    assert store.stream("s").append(b"x").offset == 0
    assert os.path.isdir(path)
    store.close()
    assert not os.path.exists(path)
    with millstream.temporary(durability="sync") as store:
        assert store.durability == "sync"
        assert store.path != path
        path = store.path
    assert not os.path.exists(path)


def test_temporary_goes_also_after_an_error():
    with pytest.raises(ZeroDivisionError), millstream.temporary() as store:
        store.stream("s").append(b"x")
        _ = 1 / 0
    assert store.closed
    assert not os.path.exists(store.path)


def test_last_to_close_marks_the_store_clean(tmp_path):
    def clean():
        return json.loads((tmp_path / "s" / "store.json").read_text())["body"]["clean"]

    store = millstream.open(tmp_path / "s")
    other = millstream.open(tmp_path / "s")
    store.stream("s").append(b"x")
    store.close()
    assert not clean()
    other.close()
    assert clean()


def test_close_syncs_what_was_written(tmp_path):
    with (
        millstream.open(tmp_path / "s", durability="process") as other,
        millstream.open(tmp_path / "s", durability="process") as store,
    ):
        store.stream("s").append(b"x")
        assert store.stream("s").durable_offset(0) == 0
        store.close()
        assert other.stream("s").durable_offset(0) == 1


def test_store_is_closed_at_exit_and_when_collected(tmp_path):
    program = textwrap.dedent("""
        import sys, millstream
        store = millstream.open(sys.argv[1])
        store.stream("s").append(b"x")
    """)
    subprocess.run([sys.executable, "-c", program, tmp_path / "s"], check=True)
    body = json.loads((tmp_path / "s" / "store.json").read_text())["body"]
    assert body["clean"]
    assert body["generation"] == 1


def test_same_process_may_open_a_store_often(tmp_path):
    stores = [millstream.open(tmp_path / "s") for _ in range(20)]
    for number, store in enumerate(stores):
        assert store.stream("s").append(b"x").offset == number
    for store in stores:
        store.close()
    with millstream.open(tmp_path / "s") as store:
        assert store.stream("s").next_offset(0) == 20


def test_closed_store_reads_as_closed(tmp_path):
    store = millstream.open(tmp_path / "s")
    assert not store.closed
    store.close()
    assert store.closed
    with pytest.raises(Closed):
        store.stream("s")
    again = pickle.loads(pickle.dumps(store))
    assert not again.closed
    again.close()


def test_handles_of_a_fork_are_refused_and_reopened(tmp_path):
    """Also where a thread held the lock of the store while the fork happened."""
    program = textwrap.dedent("""
        import os, pickle, signal, sys, threading, warnings
        import millstream
        warnings.simplefilter("ignore")
        store = millstream.open(sys.argv[1])
        stream = store.stream("s")
        stream.append(b"parent")
        reader = stream.read(partition=0, follow=True, timeout=1)
        held = threading.Event()
        def hold():
            with store._lock:
                held.set()
                threading.Event().wait()
        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            refused = 0
            for call in (lambda: stream.append(b"x"), lambda: next(reader), store.streams,
                         lambda: stream.append_many([b"x"]), lambda: stream.read(), stream.stats,
                         lambda: store.stream("s")):
                try:
                    call()
                except millstream.Closed as error:
                    assert "fork" in str(error) or "closed" in str(error), error
                    refused += 1
            assert refused == 7, refused
            assert store.closed and stream.closed
            store.close()
            again = pickle.loads(pickle.dumps(stream))
            assert again is not stream
            assert again.append(b"child").offset == 1
            again.store.close()
            sys.stdout.write("child is done\\n")
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert stream.append(b"parent").offset == 2
        values = [v for batch in stream.read() for v in batch.values]
        assert values == [b"parent", b"child", b"parent"], values
        sys.stdout.write("parent is done\\n")
        sys.stdout.flush()
        os._exit(0)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "s"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["child is done", "parent is done"]


def test_repr_says_what_it_is(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        assert re.fullmatch(r"<Store '.*/s'>", repr(store))
        assert re.fullmatch(r"<Stream 's' of '.*/s': 3 partitions>",
                            repr(store.stream("s", partitions=3)))  # fmt: skip


def test_closed_store_holds_no_file(tmp_path):
    """Each closed handle kept the control file mapped, and so a descriptor, for as long as it
    lived."""
    kept = []
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        for _ in range(5):
            with millstream.open(tmp_path / "store") as store:
                kept.append(store.stream("s", partitions=3))
                kept[-1].append(b"x")
                assert sum(map(len, kept[-1].read())) > 0
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
    for stream in kept:
        assert stream.closed
        assert stream.partitions == 3
        with pytest.raises(millstream.Closed):
            stream.append(b"x")


def test_a_store_that_the_collector_finds_in_a_cycle_still_has_its_directory():
    store = millstream.temporary()
    store.itself = store
    path = store.path
    with pytest.warns(ResourceWarning, match="unclosed"):
        del store
        gc.collect()
    assert not os.path.exists(path)
