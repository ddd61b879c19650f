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
GOOD = {"follow", "durable", "auto_commit", "on_assign", "on_revoke"}  # flags, and functions


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
