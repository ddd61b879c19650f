"""Whatever is passed for whatever argument: an error of ours, nothing stored, and all goes on."""

import contextlib
import inspect as introspection
import math

import numpy as np
import pytest

import millstream
from millstream import MillstreamError, Position

STRANGE = [
    None, True, -1, 1 << 70, -(1 << 70), 1.5, math.nan, math.inf, "", "text", "\ud800", "a/b", b"",
    b"bytes", bytearray(b"x"), [], [None], [5], ["x"], (), {}, {"a": 5}, {5: b"x"}, set(), object(),
    int, print, Position(0, 1, 1 << 60), Position(9, 9, 9), np.array("x"), np.array([1.5]),
    np.ones((2, 2)), np.array(["NaT"], "M8[s]"), np.float64(1), memoryview(b"abcdef")[::2],
    millstream.Retention(), Ellipsis, NotImplemented,
]  # fmt: skip

CALLS = {
    "append": {"value": b"v"},
    "append_many": {"values": [b"v"]},
    "append_arrow": {"data": None},
    "read": {},
    "aread": {},
    "partition_for": {"key": b"k"},
    "first_offset": {"partition": 0},
    "next_offset": {"partition": 0},
    "durable_offset": {"partition": 0},
    "offset_at": {"timestamp": 0, "partition": 0},
    "flush": {},
    "wait_durable": {"position": None},
    "delete_before": {"position": None},
    "alter": {},
    "add_partitions": {"count": None},
    "consumer": {"group": "g"},
    "group": {"name": "g"},
}
GOOD = {"follow", "on_assign", "on_revoke"}  # True waits for ever; functions


def cases():
    for name, required in CALLS.items():
        parameters = introspection.signature(getattr(millstream.Stream, name)).parameters
        for argument in parameters:
            if argument not in GOOD and argument != "self":
                yield pytest.param(name, required, argument, id=f"{name}-{argument}")


@pytest.mark.parametrize(("name", "required", "argument"), list(cases()))
def test_any_argument_of_a_stream(store, name, required, argument):
    stream = store.stream("s", partitions=2)
    stream.append_many([b"a", b"b"], partition=0, durability="sync")
    for strange in STRANGE:
        before = [stream.next_offset(p) for p in range(stream.partitions)]
        arguments = {**required, argument: strange}
        if name.startswith(("first", "next_", "durable_", "partition_")):
            arguments = {"": arguments[argument]}
        positional = [arguments.pop(key) for key in list(arguments) if key in ("", *required)]
        try:
            result = getattr(stream, name)(*positional, **arguments)
            if name == "read":
                for _ in result:
                    pass
            if name == "consumer":
                result.poll()
                result.commit()
                result.close()
        except MillstreamError:
            assert [stream.next_offset(p) for p in range(len(before))] == before
    assert stream.append(b"sound", partition=0).offset >= 2
    assert millstream.inspect.verify(store.path).ok


@pytest.mark.parametrize(
    "argument", ["name", "partitions", "retention", "segment_bytes", "durability"]
)
def test_any_argument_of_a_new_stream(store, argument):
    for strange in STRANGE:
        arguments = {"name": "s", argument: strange}
        try:
            store.stream(arguments.pop("name"), **arguments)
        except MillstreamError:
            assert store.streams() in ([], ["text"])
        else:
            for name in store.streams():
                store.drop_stream(name)


@pytest.mark.parametrize("argument", ["path", "durability", "mode", "timeout"])
def test_any_argument_of_open(tmp_path, monkeypatch, argument):
    monkeypatch.chdir(tmp_path)
    for strange in STRANGE:
        arguments = {"path": "s", argument: strange}
        with contextlib.suppress(MillstreamError):
            millstream.open(arguments.pop("path"), **arguments).close()


@pytest.mark.parametrize("argument", ["bytes", "age", "records"])
def test_any_argument_of_a_retention(argument):
    for strange in STRANGE:
        try:
            keep = millstream.Retention(**{argument: strange})
        except MillstreamError:
            continue
        assert getattr(keep, argument) is None or getattr(keep, argument) >= 0


def of_a_bool(stream, queue, consumer, producer):
    group = consumer.group
    return {
        "first_offset": lambda: stream.first_offset(True),
        "next_offset": lambda: stream.next_offset(True),
        "durable_offset": lambda: stream.durable_offset(True),
        "offset_at": lambda: stream.offset_at(0, True),
        "append": lambda: stream.append(b"v", partition=True),
        "append_many": lambda: stream.append_many([b"v"], partition=True),
        "read": lambda: stream.read(partition=True),
        "compact": lambda: stream.compact(partition=True),
        "sequence": lambda: producer.append(b"v", sequence=True),
        "first_sequence": lambda: producer.append_many([b"v"], first_sequence=True),
        "sequences": lambda: producer.append_many([b"v"], sequences=[True]),
        "partition of a producer": lambda: producer.append(b"v", sequence=9, partition=True),
        "poll": lambda: consumer.poll(True),
        "lag": lambda: consumer.lag(True),
        "seek": lambda: group.seek(0, partition=True),
        "lag of a group": lambda: group.lag(True),
        "get": lambda: queue.get(timeout=True),
    }


def test_a_bool_is_no_number(store):
    stream, queue = store.stream("s", partitions=2), store.queue("q")
    for partition in range(2):
        stream.append(b"there", partition=partition)
    queue.put(b"there")
    consumer = stream.consumer(group="g")
    with consumer, stream.producer(id="p") as producer:
        before = [stream.next_offset(partition) for partition in range(2)]
        for name, call in of_a_bool(stream, queue, consumer, producer).items():
            with pytest.raises(millstream.InvalidType, match="True: expected"):
                pytest.fail(f"{name}: {call()!r}")
        assert [stream.next_offset(partition) for partition in range(2)] == before
        assert producer.last_sequence == -1 and queue.stats().ready == 1


def test_only_a_bool_is_a_flag(stream):
    calls = {
        "follow": lambda: stream.read(follow="no"),
        "durable": lambda: stream.aread(durable="no"),
        "auto_commit": lambda: stream.consumer(group="g", auto_commit="no"),
    }
    for name, call in calls.items():
        with pytest.raises(millstream.InvalidType, match=f"{name} 'no': expected True or False"):
            call()
    assert stream.groups() == []
    expected = pytest.raises(millstream.InvalidType, match="allow_backwards 1: expected True or")
    with stream.consumer(group="g") as consumer, expected:
        consumer.commit(allow_backwards=1)


@pytest.mark.parametrize("start", [{}, {0: 1}, set(), object(), [5], (None,), True, math.nan])
def test_a_start_that_is_none_is_refused_by_a_group_that_is_there_too(stream, start):
    for _ in range(2):
        with pytest.raises(millstream.InvalidType, match=r'expected "earliest", "latest"'):
            stream.consumer(group="g", start=start)
        stream.consumer(group="g").close()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, True, "1", None])
@pytest.mark.parametrize("argument", ["session", "max_processing"])
def test_seconds_of_a_consumer_are_a_number_that_is_finite(stream, argument, wrong):
    with pytest.raises((millstream.InvalidArgument, millstream.InvalidType), match=argument):
        stream.consumer(group="g", **{argument: wrong})
    assert stream.groups() == []


def test_progress_of_a_compaction_is_a_function(stream):
    with pytest.raises(millstream.InvalidType, match="progress 5: expected a function"):
        stream.compact(progress=5)
