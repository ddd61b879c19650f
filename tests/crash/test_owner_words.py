"""The owner word between processes: who stops is waited for and named, who dies is succeeded."""

import os
import signal
import time

import crash_workers as workers
import pytest
from timing import SOON

import millstream


def hold(path, word):
    """Take a long word of partition 0 and hold it until killed."""
    store = millstream.open(path)
    log = store.stream("s")._partition(0)
    log.native.word(word, "test", 5.0).take(5.0)
    print("held", flush=True)
    signal.pause()


@pytest.fixture
def path(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        store.stream("s", partitions=2, segment_bytes=1 << 16).append(b"0", partition=0)
    return tmp_path / "store"


@pytest.mark.parametrize("word", ["sync", "maintenance"])
def test_stopped_holder_is_named_and_a_killed_one_succeeded_at_once(path, word):
    holder = workers.start("test_owner_words.hold", str(path), word)
    assert workers.line(holder) == "held"
    holder.send_signal(signal.SIGSTOP)
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s")
        log = stream._partition(0)
        store._background.stop()  # or it may be the one who takes over
        stream.append(b"1", partition=0)  # writers and readers are not blocked
        stream.append(b"1", partition=1, durability="sync")
        assert sum(map(len, stream.read())) == 3
        begin = time.monotonic()
        with pytest.raises(millstream.LockTimeout, match=f"process {holder.pid} "):
            log.native.word(word, "test", 0.2).take(0.2)
        assert 0.15 < time.monotonic() - begin < SOON
        if word == "sync":
            with pytest.raises(millstream.Indeterminate):
                stream.append(b"2", partition=0, durability="sync", timeout=0.2)
        workers.kill(holder)
        begin = time.monotonic()
        with log.native.word(word, "test", 60.0) as taken:
            elapsed, inherited = time.monotonic() - begin, taken.inherited
        assert inherited
        assert elapsed < SOON, f"take-over took {elapsed:.3f} s"
        stream.append(b"3", partition=0, durability="sync")
    workers.verified(path)
    workers.report(6, 1, 0)


def test_append_word_of_a_stopped_process_times_out_and_of_a_killed_one_is_taken_over(path):
    """The word is written by hand: no process stops for sure within the 100 ns that it holds it."""
    other = workers.start("append_each_line", str(path), 0, "process")
    assert workers.line(other) == "open"
    assert workers.ask(other, "1") == "ok 1"
    with millstream.open(path) as store:
        stream = store.stream("s")
        stream.append(b"2", partition=0)
        word = millstream._native.owner_word(0, incarnation_of(path, 0))
        assert f"process {other.pid} " in store.session.members.describe(word)
        set_append_word(path, word)
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(millstream.LockTimeout, match=f"process {other.pid} "):
            stream.append(b"3", partition=0, timeout=0.2)
        assert sum(map(len, stream.read(partition=0))) == 3  # readers take no lock
        stream.append(b"1", partition=1)
        workers.kill(other)
        begin = time.monotonic()
        assert stream.append(b"3", partition=0).offset == 3
        assert time.monotonic() - begin < SOON  # not the half minute that the living get
    workers.verified(path)
    workers.report(6, 1, 0)


def incarnation_of(path, index):
    data = (path / "members").read_bytes()
    return int.from_bytes(data[64 + 64 * index :][:4], "little")


def set_append_word(path, word):
    with open(path / "streams/s/control", "r+b") as file:
        file.seek(4096)
        file.write(word.to_bytes(4, "little"))


def sync_slowly(path):
    """Hold the sync word within a sync that never ends."""
    from millstream.disk import files

    store = millstream.open(path)
    stream = store.stream("s")

    def sync(descriptor, name):
        print("syncing", flush=True)
        signal.pause()

    files.sync = sync  # before there is anything that the background could be faster to sync
    stream.append(b"slow", partition=0, durability="process")
    stream.flush()


def test_killed_syncer_is_succeeded_and_its_pages_are_dirtied_again(path):
    syncer = workers.start("test_owner_words.sync_slowly", str(path))
    assert workers.line(syncer) == "syncing"
    with millstream.open(path) as store:
        stream = store.stream("s")
        with pytest.raises(millstream.Indeterminate):
            stream.append(b"x", partition=0, durability="sync", timeout=0.1)
        workers.kill(syncer)
        begin = time.monotonic()
        position = stream.append(b"y", partition=0, durability="sync")
        assert time.monotonic() - begin < SOON
        assert stream.durable_offset(0) > position.offset
    workers.verified(path)
    workers.report(4, 1, 0)
