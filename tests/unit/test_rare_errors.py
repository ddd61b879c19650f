"""Errors that few will meet: each is one of ours, says what was wrong, leaves what was there."""

import argparse
import asyncio
import os
import shutil
import sys
import types

import pytest

import millstream
from millstream import CorruptBatch, InvalidType, NotFound, StorageError, StoreFull, cli, inspect
from millstream.cli import records, work
from millstream.disk import files
from millstream.disk.clock import StoreClock
from millstream.queues.handle import _grown
from millstream.queues.worker import Worker
from millstream.sleepers import Calls


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def test_line_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(records, "LINE_BYTES_MAX", 100)
    outside, inside = os.pipe()
    os.write(inside, b"x" * 200)
    os.close(inside)
    with pytest.raises(Exception, match="line"):
        list(records.ready_lines(outside, b"\n"))
    os.close(outside)


def test_module_of_two_queues_does_not_tell_which_to_work_on(store, monkeypatch):
    module = types.ModuleType("two_queues")
    module.one, module.two = store.queue("one"), store.queue("two")
    monkeypatch.setitem(sys.modules, "two_queues", module)
    with pytest.raises(NotFound, match="two_queues has 2 queues"):
        work.registered(argparse.Namespace(target=["two_queues"]), print)


def test_module_that_leaves_with_a_text_is_heard(tmp_path, monkeypatch):
    (tmp_path / "leaving_jobs.py").write_text("raise SystemExit('no configuration')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit, match="no configuration"):
        cli.main(["work", "leaving_jobs:work"])


def test_redriving_all_into_a_full_queue_counts_what_it_did(store, capsys):
    q = store.queue("q", capacity=1)
    q.put(b"dead")
    q.get(timeout=0).reject("no")
    q.put(b"full")
    assert cli.main(["queue", "dead", "redrive", store.path, "q", "--all"]) != 0
    assert "not finished" in capsys.readouterr().err
    assert len(q.dead) == 1 and len(q) == 1


def test_full_disk_ends_an_append_of_lines_with_what_is_in(tmp_path, monkeypatch, capsys):
    path = tmp_path / "store"
    with millstream.open(path) as made:
        made.stream("s", partitions=2)
    monkeypatch.setattr("sys.stdin", None)

    def full(*_, **__):
        error = StoreFull(28, "No space left on device", str(path))
        error.appended = (millstream.Span(0, 0, 1, 0),)
        raise error

    monkeypatch.setattr(millstream.Stream, "append_many", full)
    monkeypatch.setattr(records, "ready_lines", lambda *_: iter([[b"one", b"two"]]))
    assert cli.main(["append", str(path), "s"]) != 0
    assert "No space left" in capsys.readouterr().err


def test_paths_that_are_none(store, tmp_path):
    with pytest.raises(InvalidType, match="expected str or os.PathLike"):
        files.absolute(5)
    here = files.Directory(store.path)
    try:
        with pytest.raises(StorageError, match="too long"):
            files.exists(files.Path(here, "x" * 300))
        os.mkfifo(tmp_path / "store" / "planted")
        with pytest.raises(StorageError, match="regular file"):
            files.open_file(files.Path(here, "planted"), write=False)
    finally:
        here.close()


def test_clock_of_a_time_that_there_is_not(tmp_path):
    saved = {"offset": 0, "since": 0, "seen": 0, "wall": 1 << 90, "gaps": [], "boot": "x"}
    with pytest.raises(CorruptBatch, match="not the state of a clock"):
        StoreClock(saved, None, joins=False)


def test_disk_without_room_for_one_extent_is_said():
    def full(_):
        raise StoreFull(28, "No space left on device", "slots")

    with pytest.raises(StoreFull):
        _grown(4, 4, 8, full)


def test_block_of_a_worker_that_cannot_end_says_so(store, monkeypatch):
    worker = Worker(store.queue("q"), print)

    def stopped():
        Worker.stop(worker)
        raise millstream.WorkerError("it did not end")

    monkeypatch.setattr(worker, "stop", stopped)
    with pytest.raises(millstream.WorkerError, match="did not end"), worker:
        pass
    with pytest.raises(KeyError), worker:  # that one comes first
        raise KeyError


@pytest.mark.parametrize(
    ("raised", "found"), [(StopIteration(5), RuntimeError), (KeyError("x"), KeyError)]
)
def test_what_a_call_in_a_thread_raises_comes_to_its_waiter(raised, found):
    def function():
        raise raised

    async def main():
        with pytest.raises(found):
            await Calls("a test", "nowhere").call(function)

    asyncio.run(main())


def test_sequences_of_a_later_copy_are_not_those_of_an_earlier_one(tmp_path):
    """Taken for its own they would refuse as sent before what was not."""
    path, early = tmp_path / "store", tmp_path / "early"
    with millstream.open(path) as made:
        made.stream("s", segment_bytes=1 << 16).producer(id="p").append(b"x", sequence=0)
    shutil.copytree(path, early)
    with millstream.open(path) as made, made.stream("s").producer(id="p") as producer:
        for number in range(1, 60):
            last = producer.append(b"x" * 5000, sequence=number)
        assert made.stream("s").delete_before(last) > 0  # what goes is kept as a sequence
    name = next(file for file in path.rglob("sequences") if file.is_file())
    shutil.copyfile(name, early / name.relative_to(path))
    assert [one for one in inspect.verify(early).problems if one.path.name == "sequences"]
    with pytest.raises(CorruptBatch, match="sequences"), millstream.open(early) as made:
        made.stream("s").producer(id="p").append(b"y", sequence=1)


def test_activation_record_behind_a_damaged_segment_is_not_guessed(tmp_path):
    """It says how the segment before ends, which nobody can tell any more."""
    path = tmp_path / "store"
    with millstream.open(path) as made:
        stream = made.stream("s", segment_bytes=1 << 16)
        for number in range(60):
            if number == 5:
                stream.flush()  # what comes next says that what lies before was synced
            stream.append(b"%d " % number + b"v" * 5000)
    one, two, *_ = sorted((path / "streams" / "s" / "00000").glob("*.seg"))
    with open(one, "r+b") as file:
        file.seek(1 << 14)
        file.write(b"?" * 3000)
    with open(two, "r+b") as file:
        file.seek(4096)
        file.write(b"?" * 64)
    actions = inspect.repair(path)
    assert {"cannot", "filler"} <= {action.kind for action in actions}
    assert {problem.path for problem in inspect.verify(path).problems} == {two}
    with millstream.open(path, mode="r") as made, pytest.raises(CorruptBatch, match="activation"):
        list(made.stream("s").read())


def test_members_that_were_cut_short_are_refused_by_who_joins(store, tmp_path):
    path = tmp_path / "store" / "members"
    whole = path.read_bytes()
    os.truncate(path, 10)
    try:
        with pytest.raises(CorruptBatch, match="too short"):
            millstream.open(store.path)
    finally:
        path.write_bytes(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody else")
def test_file_of_somebody_else_is_not_opened(store, tmp_path):
    (tmp_path / "store" / "planted").write_bytes(b"x")
    os.chown(tmp_path / "store" / "planted", 12345, 12345)
    here = files.Directory(store.path)
    with pytest.raises(StorageError, match="belongs to user 12345"):
        files.open_file(files.Path(here, "planted"), write=False)
    here.close()
