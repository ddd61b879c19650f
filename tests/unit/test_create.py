"""What is not there: made by default, refused with create=False, pointed out to who reads it."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest

import millstream
from millstream import Empty, MillstreamWarning, NotFound, inspect
from millstream.log import sequences, settings
from millstream.queues import backup as queue_backup
from millstream.store import backup


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def test_open_makes_nothing_when_it_is_told_not_to(tmp_path):
    path = tmp_path / "metrics"
    for make in (lambda: None, path.mkdir):
        make()
        with pytest.raises(NotFound, match="metrics: there is no store"):
            millstream.open(path, create=False)
        assert not path.exists() or os.listdir(path) == []
    millstream.open(path).close()
    with millstream.open(path, create=False) as store:
        store.stream("s").append(b"x")
    for create in (False, True):
        millstream.open(path, mode="r", create=create).close()
    with pytest.raises(NotFound, match=r"did you mean '.*/metrics'\?"):
        millstream.open(tmp_path / "metrcis", create=False)
    with pytest.raises(NotFound, match="stores beside it: 'metrics'"):
        millstream.open(tmp_path / "other", mode="r")


def test_a_name_that_is_not_there_is_refused_with_those_that_are(store, tmp_path):
    for what, make, names in (
        ("stream", store.stream, store.streams),
        ("queue", store.queue, store.queues),
    ):
        with pytest.raises(NotFound, match=f"no {what} 'flights'. There is none."):
            make("flights", create=False)
        for name in ("flights", "orders"):
            make(name)
            assert make(name, create=False) is make(name)
        with pytest.raises(NotFound, match=r"'flihgts'. Did you mean 'flights'\?"):
            make("flihgts", create=False)
        with pytest.raises(NotFound, match="'x'. There are 'flights', 'orders'."):
            make("x", create=False)
        assert names() == ["flights", "orders"]
        with (
            millstream.open(store.path, mode="r") as reader,
            pytest.raises(NotFound, match="Did you mean 'orders'"),
        ):
            getattr(reader, what)("order")
    with pytest.raises(NotFound, match="Did you mean 'orders'"):
        store.drop_stream("order")
    with pytest.raises(NotFound, match="Did you mean 'orders'"):
        store.drop_queue("order")


def test_a_group_that_is_not_there_is_refused(store):
    stream = store.stream("s", create=True)
    with pytest.raises(NotFound, match="no group 'billing'. There is none."):
        stream.consumer("billing", create=False)
    assert stream.groups() == []
    stream.consumer("billing").close()
    stream.consumer("billing", create=False).close()
    for call in (lambda name: stream.consumer(name, create=False), stream.group):
        with pytest.raises(NotFound, match=r"Did you mean 'billing'\?"):
            call("biling")


@pytest.mark.parametrize("wrong", [0, "no", [], 1.5])
def test_create_is_true_or_false(store, tmp_path, wrong):
    for call in (
        lambda: millstream.open(tmp_path / "x", create=wrong),
        lambda: store.stream("x", create=wrong),
        lambda: store.queue("x", create=wrong),
        lambda: store.stream("s").consumer("g", create=wrong),
    ):
        with pytest.raises(millstream.InvalidType, match="create"):
            call()
    assert not (tmp_path / "x").exists()


# --- reading what was made this moment ------------------------------------------------------------


def iterated(stream):
    with stream.consumer("h", timeout=0) as consumer:
        assert len(list(consumer)) <= 1


async def aread(stream):
    return [batch async for batch in stream.aread()]


async def aiterated(stream):
    with stream.consumer("i", timeout=0) as consumer:
        assert len([batch async for batch in consumer]) <= 1


READS = {
    "read": lambda stream: list(stream.read()),
    "one partition": lambda stream: list(stream.read(partition=1)),
    "follow": lambda stream: list(stream.read(follow=True, timeout=0)),
    "aread": lambda stream: asyncio.run(aread(stream)),
    "view": lambda stream: stream.view().close(),
    "consumer": iterated,
    "aconsumer": lambda stream: asyncio.run(aiterated(stream)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_a_stream_that_was_made_this_moment_is_pointed_out_once(store, read):
    store.stream("flights").append(b"x")
    stream = store.stream("flihgts")
    stream.add_partitions(1)
    match = r"'flihgts' was not there.*Did you mean 'flights'"
    with pytest.warns(MillstreamWarning, match=match) as found:
        read(stream)
    assert [one.filename for one in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for again in READS.values():
            again(stream)
            again(store.stream("flihgts"))


def follow(stream):
    next(stream.read(follow=True))


async def afollow(stream):
    return [batch async for batch in stream.aread(follow=True, max_records=1)]


def consume(stream):
    with stream.consumer("g") as consumer:
        assert consumer.poll(None)


@pytest.mark.parametrize("wait", [follow, lambda s: asyncio.run(afollow(s)), consume])
def test_who_waits_is_told_after_a_second(store, monkeypatch, wait):
    monkeypatch.setattr(settings, "SURPRISE_SECONDS", 0.0)
    stream = store.stream("s")

    def wake():
        while stream._is_surprise:  # who waits looks again, and is told
            stream._wake()
        stream.append(b"x")

    waking = threading.Thread(target=wake)
    with pytest.warns(MillstreamWarning, match="was not there"):
        waking.start()
        wait(stream)
    waking.join()


def test_who_gets_something_before_a_second_is_over_is_told_nothing(store, monkeypatch):
    monkeypatch.setattr(settings, "SURPRISE_SECONDS", 3600.0)
    stream = store.stream("s")
    late = threading.Timer(0.05, stream.append, (b"x",))
    late.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(stream)
    late.join()


def test_what_was_meant_is_not_pointed_out(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = store.stream("made", create=True)
        made.add_partitions(1)
        for read in READS.values():
            read(made)
            read(store.stream("named", partitions=2))
        late = store.stream("late")
        batches, consumer = late.read(), late.consumer("g")
        late.append(b"x")
        assert len(next(batches)) == len(consumer.poll(0)) == 1
        consumer.close()
        appended = store.stream("appended")
        appended.add_partitions(1)
        appended.append(b"x")
        for read in READS.values():
            read(appended)
        with millstream.open(store.path) as other:
            for read in READS.values():
                read(other.stream("made"))


def test_a_reader_that_came_first_goes_on_after_the_warning(store):
    """As an error it is nothing more than an error: the next read reads."""
    stream = store.stream("first")
    with warnings.catch_warnings(), pytest.raises(MillstreamWarning):
        warnings.simplefilter("error")
        next(stream.read())
    stream.append(b"x")
    assert [list(batch.values) for batch in stream.read()] == [[b"x"]]


# --- who makes again what another process drops ---------------------------------------------------


def test_dropping_and_looking_never_make_it_again(store, tmp_path):
    """What goes through all names while another process drops them."""
    with millstream.open(store.path) as other:
        names = [f"n{number}" for number in range(12)]
        for name in names:
            store.stream(name).append(b"x")
            store.queue(name).put(b"x")

        def drop():
            for name in names:
                other.drop_stream(name)
                other.drop_queue(name)

        dropping = threading.Thread(target=drop)
        dropping.start()
        number = 0
        try:
            while dropping.is_alive():
                with contextlib.suppress(millstream.MillstreamError):  # of what goes meanwhile
                    store.flush()
                with contextlib.suppress(millstream.MillstreamError):
                    store.advice()
                with contextlib.suppress(millstream.MillstreamError):
                    store.backup(tmp_path / f"copy{number}")
                number += 1
        finally:
            dropping.join()
        assert store.streams() == store.queues() == []


DROP_AND_DIE = """
import os, sys
import millstream
from millstream.disk import files

files.rename = lambda *paths: os._exit(9)
store = millstream.open(sys.argv[1])
getattr(store, f"drop_{sys.argv[2]}")("order")
"""


@pytest.mark.parametrize("kind", ["stream", "queue"])
@pytest.mark.parametrize("again", ["make", "look", "drop"])
def test_drop_of_a_process_that_was_killed_in_it_is_finished(store, kind, again):
    """The name stood for a handle that was closed, until everybody had left."""
    make, drop = getattr(store, kind), getattr(store, f"drop_{kind}")
    known = make("order", create=True)
    command = [sys.executable, "-c", DROP_AND_DIE, store.path, kind]
    assert subprocess.run(command, timeout=300).returncode == 9
    if again == "make":
        known = make("order", create=True)
        assert known.append(b"x").offset == 0 if kind == "stream" else known.put(b"x") >= 0
    else:
        if again == "look":
            with pytest.raises(NotFound):
                make("order", create=False)
        else:
            drop("order")  # it was listed until now
        assert store.streams() == store.queues() == []
        with pytest.raises(NotFound):
            drop("order")


@pytest.mark.parametrize("place", ["groups", "logs", "copy", "queue"])
@pytest.mark.parametrize("again", [False, True])
def test_backup_leaves_out_what_is_dropped_meanwhile(store, tmp_path, monkeypatch, place, again):
    """It ended with `Closed`, which is not among what it raises."""
    for name in ("a", "b"):
        store.stream(name, partitions=2).append(b"x")
        store.queue(name).put(b"x")
    module, what = {
        "groups": (backup, "_groups"),
        "logs": (sequences, "snapshot"),
        "copy": (backup, "_copy_partition"),
        "queue": (queue_backup, "copy"),
    }[place]
    real = getattr(module, what)

    def drop_first(*arguments, **options):
        monkeypatch.setattr(module, what, real)
        with millstream.open(store.path) as other:
            for make, drop in ((other.stream, other.drop_stream), (other.queue, other.drop_queue)):
                drop("a")
                if again:
                    make("a", create=True)
        return real(*arguments, **options)

    monkeypatch.setattr(module, what, drop_first)
    store.backup(tmp_path / "copy")
    with millstream.open(tmp_path / "copy") as copy:
        assert "b" in copy.streams()
        assert "b" in copy.queues()
        assert sum(map(len, copy.stream("b").read())) == len(copy.queue("b")) == 1
    assert inspect.verify(tmp_path / "copy").ok


def test_a_pickled_handle_makes_nothing(store):
    stream = store.stream("s")
    remake, arguments = stream.__reduce__()
    store.drop_stream("s")
    with pytest.raises(NotFound):
        remake(*arguments)
    assert store.streams() == []


# --- queues ---------------------------------------------------------------------------------------


def got(queue):
    with pytest.raises(Empty):
        queue.get(timeout=0)


async def agot(queue):
    with pytest.raises(Empty):
        await queue.aget(timeout=0)


LOOKS = {
    "get": got,
    "get_many": lambda queue: queue.get_many(5, timeout=0),
    "peek": lambda queue: queue.peek(),
    "aget": lambda queue: asyncio.run(agot(queue)),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looking_into_a_queue_that_was_made_this_moment_is_pointed_out_once(store, look):
    store.queue("mails").put(b"x")
    queue = store.queue("mials", codec="json")
    match = r"the queue 'mials' was not there.*Did you mean 'mails'"
    with pytest.warns(MillstreamWarning, match=match) as found:
        look(queue)
    assert [one.filename for one in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for again in LOOKS.values():
            again(queue)
            again(store.queue("mials"))
            again(store.queue("named", capacity=5))
            again(store.queue("meant", create=True))
        used = store.queue("used")
        used.put(b"x")
        used.get().ack()
        for again in LOOKS.values():
            again(used)


def test_who_waits_for_a_message_is_told_after_a_second(store):
    queue = store.queue("q")
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun = time.monotonic()
        with pytest.raises(MillstreamWarning, match="the queue 'q' was not there"):
            queue.get(timeout=60)
        seen.append(time.monotonic() - begun)
    assert 1.0 <= seen[0] < 60
    queue.put(b"x")
    assert queue.get(timeout=0).value == b"x"


def test_a_worker_waits_for_the_first_message_in_peace(store):
    queue = store.queue("q")
    done = threading.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with millstream.Worker(queue, lambda message: done.set()) as worker:
            queue.put(b"x")
            assert done.wait(60)
    assert worker.stop().done == 1
