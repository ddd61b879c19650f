"""What is refused, and that it leaves everything as it was."""

import argparse
import os
import pickle
from datetime import datetime, timedelta, timezone

import pytest

import millstream
from millstream import InvalidArgument, InvalidType, NotFound, Position, StorageError, cli
from millstream.cli import departures, output
from millstream.disk import files, reserve
from millstream.errors import each_of
from millstream.groups import group
from millstream.store import store as store_module
from millstream.testing import clock

EARLY = timezone(timedelta(hours=-1))
ARGUMENTS = [
    (lambda s, q: s.store.pipe(s, "no", q), InvalidType, "something to call"),
    (lambda s, q: s.store.pipe(s, bytes, {"q": 5}), InvalidType, "a stream or a queue"),
    (lambda s, q: s.store.queue("r", retry=5), InvalidType, "RetryPolicy"),
    (lambda s, q: s.store.queue("r", capacity=(1 << 24) - 2, dead_limit=9), InvalidArgument,
     "together"),
    (lambda s, q: s.consumer("g", on_assign=5), InvalidType, "on_assign"),
    (lambda s, q: s.compact(progress=5), InvalidType, "progress 5"),
    (lambda s, q: q.dead.redrive(["x"]), InvalidType, "expected an int"),
    (lambda s, q: q.dead.redrive([-1]), InvalidArgument, "not the id"),
    (lambda s, q: s.store.backup(f"{s.store.path}/copy"), InvalidArgument, "lies within"),
    (lambda s, q: s.append(b"x", timestamp=datetime.max.replace(tzinfo=EARLY)), InvalidArgument,
     "timestamp"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), ARGUMENTS)
def test_wrong_arguments_are_refused_before_anything_is_stored(store, call, kind, text):
    s, q = store.stream("s"), store.queue("q")
    with pytest.raises(kind, match=text):
        call(s, q)
    assert (s.next_offset(0), len(q)) == (0, 0)
    assert (store.streams(), store.queues(), s.groups()) == (["s"], ["q"], [])


def test_pipe_stays_in_one_store_and_its_sinks_are_those_it_has(store, tmp_path):
    source, q = store.stream("in"), store.queue("q")
    with (
        millstream.open(tmp_path / "other") as other,
        pytest.raises(InvalidArgument, match="one store"),
    ):
        store.pipe(source, bytes, other.queue("q"))
    source.append(b"x")
    for result, kind in ((5, InvalidType), ({"r": b"x"}, InvalidArgument)):
        with (
            store.pipe(source, lambda _, r=result: r, {"q": q}) as pipe,
            pytest.raises(kind),
        ):
            pipe.step()
    assert len(q) == 0


def test_clock_that_has_ended_is_refused():
    with clock() as ended:
        pass
    with pytest.raises(InvalidArgument, match="ended"):
        ended.set_wall(1)


def test_pickle_of_what_is_dropped_or_gone_is_refused(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        pickled = pickle.dumps(store.queue("q"))
        store.drop_queue("q")
        with pytest.raises(NotFound, match="'q' any more"):
            pickle.loads(pickled)
        assert store.queues() == []
        pickled = pickle.dumps(store)
    os.unlink(tmp_path / "store" / "store.json")
    with pytest.raises(StorageError):
        pickle.loads(pickled)


def test_store_whose_file_is_gone_while_it_is_open_is_not_made_anew(tmp_path):
    path = tmp_path / "store" / "store.json"
    with millstream.open(tmp_path / "store"):
        raw = path.read_bytes()
        path.unlink()
        with pytest.raises(StorageError, match="is missing while"):
            millstream.open(tmp_path / "store")
        assert not path.exists()
        path.write_bytes(raw)


def test_stream_whose_file_is_gone_is_not_made_anew(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        store.stream("s").append(b"x")
    with millstream.open(tmp_path / "store") as store:
        path = tmp_path / "store" / "streams" / "s" / "stream.json"
        raw = path.read_bytes()
        path.unlink()
        with pytest.raises(millstream.CorruptBatch, match="is missing"):
            store.stream("s")
        path.write_bytes(raw)
        assert store.stream("s").next_offset(0) == 1


@pytest.mark.parametrize("kind", ["stream", "queue"])
def test_what_another_process_makes_just_now_is_there(tmp_path, monkeypatch, kind):
    """Its directory comes between the look for its settings and the look for itself."""
    with millstream.open(tmp_path / "store") as store, millstream.open(tmp_path / "store") as other:
        exists, asked = files.exists, []

        def looking(path):
            there = exists(path)
            if path.name == f"{kind}.json" and not asked:
                asked.append(path)
                getattr(other, kind)("s", create=True)
            return there

        monkeypatch.setattr(files, "exists", looking)
        with pytest.raises(millstream.NotFound):  # it was not there when it was asked for
            getattr(store, kind)("s", create=False)
        assert asked
        assert getattr(store, kind)("s", create=False).name == "s"


def test_temporary_store_that_cannot_be_opened_leaves_nothing(tmp_path, monkeypatch):
    def refusing(directory, **_):
        raise StorageError(5, "Input/output error", directory)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(store_module, "open", refusing)
    with pytest.raises(StorageError, match="Input/output"):
        store_module.temporary()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["stream", "queue"])
def test_drop_that_the_disk_refuses_can_be_done_again(store, monkeypatch, kind):
    getattr(store, kind)("x")
    drop = getattr(store, f"drop_{kind}")

    def refusing(path, target):
        raise StorageError(5, "Input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", refusing)
        with pytest.raises(StorageError, match="Input/output"):
            drop("x")
    drop("x")
    assert (store.streams(), store.queues()) == ([], [])


@pytest.mark.parametrize("kind", ["stream", "queue"])
def test_drop_that_another_one_was_faster_at_is_done(store, monkeypatch, kind):
    getattr(store, kind)("x")
    rename = files.rename
    with millstream.open(store.path) as other:
        getattr(other, kind)("x")

        def late(path, target):
            monkeypatch.setattr(files, "rename", rename)
            getattr(other, f"drop_{kind}")("x")
            rename(path, target)

        monkeypatch.setattr(files, "rename", late)
        getattr(store, f"drop_{kind}")("x")
        with pytest.raises(NotFound, match=f"there is no {kind} 'x'"):
            getattr(other, f"drop_{kind}")("x")
    assert (store.streams(), store.queues()) == ([], [])


@pytest.mark.parametrize(
    ("name", "at", "raw", "kind"),
    [
        ("members", 8, b"\x02", millstream.VersionMismatch),
        ("streams/s/control", 0, b"?", StorageError),
    ],
)
def test_file_that_is_another_while_the_store_is_open_is_refused(tmp_path, name, at, raw, kind):
    with millstream.open(tmp_path / "store") as store:
        store.stream("s").append(b"x")
        path = tmp_path / "store" / name
        before = path.read_bytes()[at : at + 1]
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(raw)
            file.flush()
            with pytest.raises(kind), millstream.open(tmp_path / "store") as other:
                other.stream("s")
            file.seek(at)
            file.write(before)
        assert store.stream("s").next_offset(0) == 1


def test_full_disk_without_a_reserve_is_said(tmp_path):
    def full():
        raise millstream.StoreFull(28, "No space left on device", tmp_path)

    with millstream.open(tmp_path / "store") as store, pytest.raises(millstream.StoreFull):
        reserve.lend(store.session.root / "streams", full)


def test_fault_of_a_program_is_not_taken_for_one_of_ours(monkeypatch):
    done = []
    with pytest.raises(ZeroDivisionError):
        each_of([lambda: 1 // 0, lambda: done.append(1)])
    assert done == []
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=lambda _: 1 // 0)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_position_of_another_partition_is_refused(store):
    stream = store.stream("s", partitions=2)
    with pytest.raises(InvalidArgument, match="is not of partition 0"):
        group.position_at(stream, 0, Position(1, 1, 0))


def test_path_that_is_no_text_is_shown_as_json_and_a_package_may_lack_its_names(tmp_path):
    assert output.to_json("\udcff") == b'"\\udcff"'
    assert departures.airlines(str(tmp_path)) == {}


def test_queue_that_another_one_dropped_or_replaced_is_closed_here(store):
    with millstream.open(store.path) as other:
        for state in (files.DROPPED, files.REPLACED):
            q, theirs = store.queue("q"), other.queue("q")
            theirs._set_state(state)
            for call in (lambda q=q: q.put(b"x"), q.peek):
                with pytest.raises(millstream.Closed):
                    call()
            assert q.closed
            if state == files.REPLACED:  # whoever replaces hints puts others in their place
                theirs._set_state(files.LIVE)
            other.drop_queue("q")
        assert store.queues() == []


def test_segment_whose_activation_is_damaged_under_an_open_store_is_named(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        for _ in range(4):
            store.stream("s", segment_bytes=1 << 16).append(b"x" * 40_000)
    with millstream.open(tmp_path / "store", durability="process") as store:
        log = store.stream("s")._log(0)
        path = log.segments.file(log.segments.current()[0])
        log.segments.forget()
        with open(path, "r+b") as file:
            file.seek(4096 + 24)
            (byte,) = file.read(1)
            file.seek(4096 + 24)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(millstream.CorruptBatch, match="activation record") as raised:
            list(store.stream("s").read(partition=0))
        assert (raised.value.path, raised.value.position) == (path, 4096)
