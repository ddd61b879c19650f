"""Codecs: what makes bytes of values, and what becomes of bytes that are no values."""

import pickle
import types

import pytest

import millstream
from millstream import codecs


def test_json_keeps_what_json_has():
    value = {"name": "Ann", "list": [1, 2.5, None, True], "städte": "Köln"}
    assert codecs.json.decode(codecs.json.encode(value)) == value
    assert codecs.json.decode(memoryview(codecs.json.encode(value))) == value
    assert codecs.json.encode({"a": 1}) == b'{"a":1}'


@pytest.mark.parametrize("value", [float("nan"), b"bytes", {1, 2}, object()])
def test_json_refuses_what_json_has_not(value):
    with pytest.raises((TypeError, ValueError)):
        codecs.json.encode(value)


def test_pickle_keeps_sets_and_tuples():
    assert codecs.pickle.decode(codecs.pickle.encode({(1, 2)})) == {(1, 2)}


def test_resolve_takes_names_objects_and_modules():
    class Upper:
        def encode(self, value):
            return value.upper()

        def decode(self, data):
            return data.lower()

    mine = Upper()
    assert codecs.resolve(None) is None
    assert codecs.resolve("json") is codecs.json
    assert codecs.resolve("pickle") is codecs.pickle
    assert codecs.resolve(mine) is mine
    import json

    standard = codecs.resolve(json)  # dumps and loads, as orjson has
    assert standard.decode(standard.encode([1])) == [1]
    assert standard.encode([1]) == b"[1]"


def test_msgspec_and_orjson_are_codecs():
    orjson = pytest.importorskip("orjson")
    msgspec = pytest.importorskip("msgspec")
    for module in (orjson, msgspec.json, msgspec.msgpack):
        codec = codecs.resolve(module)
        assert codec.decode(codec.encode({"a": [1]})) == {"a": [1]}


@pytest.mark.parametrize("wrong", ["yaml", "", "PICKLE"])
def test_other_names_are_refused(wrong):
    with pytest.raises(millstream.InvalidArgument, match="json"):
        codecs.resolve(wrong)


@pytest.mark.parametrize("wrong", [1, object(), types.ModuleType("empty"), pickle.dumps])
def test_objects_that_cannot_encode_are_refused(wrong):
    with pytest.raises((millstream.InvalidType, ImportError)):
        codecs.resolve(wrong)


@pytest.mark.parametrize("codec", [codecs.json, codecs.pickle, codecs.resolve(pickle)])
def test_codec_goes_to_other_processes(codec):
    again = pickle.loads(pickle.dumps(codec))
    assert again.decode(codec.encode([1])) == [1]


@pytest.mark.parametrize("codec", ["json", "pickle"])
def test_queue_gives_back_what_was_put(store, codec):
    queue = store.queue("q", codec=codec)
    value = {"to": ["ann", "bob"], "n": 1}
    queue.put(value)
    queue.put_many([millstream.Put(value), millstream.Put(value, priority=0)])
    for _ in range(3):
        with queue.get(timeout=60) as message:
            assert message.value == value


@pytest.mark.parametrize("codec", ["yaml", 5])
def test_queue_is_not_made_where_its_codec_is_none(store, codec):
    with pytest.raises((millstream.InvalidArgument, millstream.InvalidType), match="codec"):
        store.queue("q", codec=codec)
    assert store.queues() == []


def test_codec_is_never_chosen_by_data(store):
    """A pickle in a queue that was opened without a codec, or with another, is only bytes."""
    store.queue("q", codec="pickle").put({"a": 1})
    raw = store.queue("q", codec=None)
    with raw.get(timeout=60) as message:
        assert bytes(message.data)[:1] == b"\x80"
        message.release()


def test_value_that_cannot_be_encoded_is_not_put(store):
    queue = store.queue("q", codec="json")
    with pytest.raises((TypeError, ValueError)):
        queue.put({1, 2})
    assert len(queue) == 0


def test_message_that_cannot_be_decoded_goes_to_the_dead_letters(store):
    store.queue("q").put(b"\xff no json")
    queue = store.queue("q", codec="json")
    message = queue.get(timeout=60)
    with pytest.raises(ValueError):
        _ = message.value
    assert message.finished
    assert len(queue) == 0
    (dead,) = queue.dead.list()
    assert "decod" in dead.last_error
