"""Every object that users get says in its repr what it is and how it stands."""

import contextlib
import importlib
import inspect

import pytest

import millstream
from millstream import _native
from millstream.testing import Clock, clock

MODULES = (
    *(
        "store.advice",
        "codecs",
        "log.compaction",
        "compat",
        "groups.consumer",
        "queues.dead_letters",
        "groups.group",
    ),
    *(
        "options",
        "transactions.pipe",
        "streams.producer",
        "queues.queue",
        "queues.records",
        "groups.sql_position",
        "streams.stats",
        "store.store",
    ),
    *("streams.stream", "testing", "transactions.transaction", "streams.view", "worker", "inspect"),
)
"""Modules whose classes users get objects of."""
FROM_C = (
    *("Batch", "BytesColumn", "HeadersColumn", "ArrowSelection", "Message", "Position", "Span"),
)
PROTOCOLS = ("Codec",)


def classes():
    """Each class that a user gets an object of."""
    yield from (getattr(_native, name) for name in FROM_C)
    for module in ("millstream", *(f"millstream.{name}" for name in MODULES)):
        found = importlib.import_module(module)
        for name in getattr(found, "__all__", ()):
            kind = getattr(found, name)
            if inspect.isclass(kind) and name not in PROTOCOLS:
                yield kind


PUBLIC = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in classes()}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_class_has_a_repr_of_its_own(name):
    assert PUBLIC[name].__repr__ is not object.__repr__


@pytest.fixture
def parts(tmp_path):
    """A store, and one of each thing in it."""
    with millstream.open(tmp_path / "s") as store:
        stream, queue = store.stream("words", partitions=1), store.queue("mail", capacity=7)
        stream.append_many([b"a", b"b"], keys=[b"k", None], headers={"h": b"v"})
        yield store, stream, queue


def test_a_message_says_its_size_and_its_key(parts):
    _, _, queue = parts
    number = queue.put(b"x" * 1000, key=b"ann")
    other = queue.put(b"")
    with queue.get(timeout=5) as m:
        said = f"<Message {number} of queue 'mail': 1000 bytes, key b'ann', attempt 1, "
        assert repr(m) == f"{said}leased>"
    assert repr(m) == f"{said}ack>"
    m = queue.get(timeout=5)
    assert repr(m) == f"<Message {other} of queue 'mail': 0 bytes, attempt 1, leased>"
    m.release()
    queue.put(b"y", key=b"k" * 3000)
    with contextlib.ExitStack() as stack:
        for m in queue.get_many(2, timeout=5):
            stack.enter_context(m)
            assert len(repr(m)) < 200


def test_what_is_looked_at_is_short_however_long_it_is(parts):
    _, _, queue = parts
    queue.put(b"x" * 1_000_000, key=b"ann")
    [stored] = queue.peek()
    assert f"{b'x' * 40!r}... of 1000000 bytes, key b'ann', ready, priority 0, 0 att" in repr(
        stored
    )
    queue.get(timeout=5).reject("no such address")
    [letter] = queue.dead.list()
    assert repr(letter).endswith("bytes, key b'ann', 'no such address' after 1 attempts>")
    assert max(len(repr(stored)), len(repr(letter))) < 200


def test_a_put_is_shown_short_and_can_be_read_back_where_it_is():
    put = millstream.Put(b"x" * 1_000_000, key=b"k" * 3000, headers={"h": b"v" * 9000}, delay=3)
    assert len(repr(put)) < 300
    assert "delay=3" in repr(put)
    put = millstream.Put({"to": "ann"}, key=b"ann")
    assert repr(put) == "Put({'to': 'ann'}, key=b'ann')"


def test_queues_and_dead_letters_say_how_many_there_are(parts):
    store, _, queue = parts
    queue.put_many([b"a", b"b"])
    assert repr(queue) == f"<Queue 'mail' of {store.path!r}: 2 of 7 messages>"
    queue.get(timeout=5).reject("no")
    assert repr(queue.dead) == "<DeadLetters of queue 'mail': 1 message>"
    queue.pause()
    assert repr(queue) == f"<Queue 'mail' of {store.path!r}: 1 of 7 messages, paused>"
    store.drop_queue("mail")
    assert repr(queue) == f"<Queue 'mail' of {store.path!r}: closed>"
    assert repr(queue.dead) == "<DeadLetters of queue 'mail': closed>"


def test_a_pipe_says_from_where_to_where_and_how_far(parts):
    store, stream, queue = parts
    with store.pipe(stream, lambda record: record.value, queue, group="g") as pipe:
        assert repr(pipe) == "<Pipe from stream 'words' to 'mail': 0 done, 0 aborted>"
        pipe.run(timeout=0)
        assert repr(pipe) == "<Pipe from stream 'words' to 'mail': 2 done, 0 aborted>"
    assert repr(pipe) == "<Pipe from stream 'words' to 'mail': closed, 2 done, 0 aborted>"


def test_stores_and_groups_say_whether_they_are_closed(parts):
    store, stream, _ = parts
    with millstream.open(store.path, mode="r") as reader:
        assert repr(reader) == f"<Store {store.path!r} (read-only)>"
    assert repr(reader) == f"<Store {store.path!r} (closed)>"
    with stream.consumer(group="g"):
        pass
    group = stream.group("g")
    assert repr(group) == f"<Group 'g' of {stream!r}>"
    group.remove()
    assert repr(group) == f"<Group 'g' of {stream!r} (closed)>"


def test_a_worker_says_whether_it_runs(parts):
    _, _, queue = parts
    queue.worker()(print)
    [worker] = queue._workers
    assert repr(worker) == "<Worker of queue 'mail': print, thread, not running>"
    with worker:
        assert "print, thread, running, 0 done" in repr(worker)


def test_arrow_columns_say_of_what_they_are(parts):
    _, stream, _ = parts
    [batch] = stream.read()
    columns = batch.arrow(["offset", "value"])
    assert repr(columns) == f"<Arrow columns offset, value of {batch!r}>"


def test_a_clock_says_how_far_it_is_ahead():
    with clock() as time:
        assert isinstance(time, Clock)
        time.advance(90)
        assert repr(time) == "<Clock: 90 s ahead>"
    assert repr(time) == "<Clock: ended>"


def test_aget_shows_what_it_is(store):
    queue = store.queue("q")
    getting = queue.aget(timeout=5)
    assert repr(getting) == "<Queue.aget(timeout=5.0) of 'q': to be awaited, or for async with>"
    getting.close()
