"""Closed is closed: no descriptor waits for the collector of cycles."""

import contextlib
import gc
import os

import pytest

import millstream

TIMES = 5


@pytest.fixture(autouse=True)
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def committed(store):
    queue = store.queue("q")
    with store.transaction() as tx:
        tx.append(store.stream("s"), b"1")
        tx.put(queue, b"1")


def produced(store):
    producer = store.stream("s").producer("p")
    producer.append(b"1", sequence=producer.last_sequence + 1)


def consumed(store):
    store.stream("s").append(b"1")
    with store.stream("s").consumer("g", timeout=0) as consumer:
        consumer.poll(0)
        consumer.commit()


def viewed(store):
    store.stream("s").append(b"1", key=b"k")
    store.stream("s").view().close()


def worked(store):
    queue = store.queue("q", dedup_window=60)
    queue.put(b"1")
    with store.pipe(queue, lambda message: message.value, store.stream("s")) as pipe:
        pipe.step()
    queue.put(b"1")
    with millstream.Worker(queue, lambda message: None):
        queue.join()


def compacted(store):
    stream = store.stream("c", compact=millstream.Compaction())
    stream.append(b"1", key=b"k")
    stream.compact()


@pytest.mark.parametrize("work", [committed, produced, consumed, viewed, worked, compacted])
def test_closed_store_has_nothing_open(tmp_path, work):
    def once():
        with millstream.open(tmp_path / "store", durability="process") as store:
            work(store)

    once()
    before = descriptors()
    for _ in range(TIMES):
        once()
    assert descriptors() == before


DAMAGE = {
    "a record of the journal": lambda path: None,  # which `killed` leaves
    "settings of the journal": lambda path: (path / "streams/@journal/stream.json").write_text("{"),
    "settings of a queue": lambda path: (path / "queues/q/queue.json").write_text("{"),
    "slots of a queue": lambda path: (path / "queues/q/slots").write_bytes(b"x" * 5000),
    "settings of a stream": lambda path: (path / "streams/s/stream.json").write_text("{"),
}


def killed(path):
    """A store whose journal has what is no transaction, of a process that died."""
    child = os.fork()
    if child == 0:
        store = millstream.open(path, durability="process")
        committed(store)
        produced(store)
        store._transactions.journal().stream.append(b'["nothing"]')
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_store_that_cannot_be_opened_leaves_nothing_open(tmp_path, damage):
    path = tmp_path / "store"
    killed(path)
    damage(path)

    def once():
        with contextlib.suppress(millstream.MillstreamError):
            millstream.open(path)
            raise AssertionError("it was to fail")

    once()
    before = descriptors()
    for _ in range(TIMES):
        once()
    assert descriptors() == before


def test_view_of_a_reader_of_a_killed_store_closes_at_once(tmp_path, monkeypatch):
    """Its map is its own, so that it sleeps until it is woken; and nobody else wakes it."""
    killed(tmp_path / "store")
    with millstream.open(tmp_path / "store", mode="r") as store:
        stream = store.stream("s")
        woken = []
        wake = stream._wake
        monkeypatch.setattr(type(stream), "_wake", lambda self: (woken.append(1), wake()))
        stream.view().close()
        assert woken
