"""What a power cut took from the files of a queue is put again by the next open, once."""

import shutil
import time

import pytest
from transaction_steps import log_of, run

import millstream
from millstream.disk.session import LOCK_SECONDS
from millstream.testing import clock

KEPT = ("slots", "blocks", "dedup")
BEGIN = """
import os, shutil
def keep():
    shutil.copytree(sys.argv[1] + "/queues/q", sys.argv[2], dirs_exist_ok=True)
store = millstream.open(sys.argv[1], durability="interval")
q = store.queue("q", create=False)
"""
DIE = "os._exit(0)\n"


SMALL = {"capacity": 9, "dead_limit": 4, "payload_bytes": 1 << 16}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def lost(path, kept):
    """What the disk has of the queue after the power cut: as it was when it was kept."""
    for name in KEPT:
        if (kept / name).exists():
            shutil.copyfile(kept / name, path / "queues" / "q" / name)


def replayed(path):
    """What waits in the queue after the open, and after one more whose replay was all it did."""
    run("millstream.open(sys.argv[1])\nimport os\nos._exit(0)", path)
    with millstream.open(path, durability="process") as store:
        q = store.queue("q")
        q._check()
        counts = q._counts()
        assert counts["prepared"] == counts["acking"] == 0
        return q.capacity, sorted(m.value for m in q.peek(99))


def test_queue_that_is_full_when_a_message_is_put_again_gets_room_for_it(path, tmp_path):
    """The acknowledgement that had made room is lost, as may be at this level."""
    with millstream.open(path) as store:
        store.queue("q", **SMALL | {"capacity": 1}).put(b"old")
    run(
        BEGIN + "keep(); q.get().ack()\n"
        "with store.transaction() as tx: tx.put(q, b'new')\n" + DIE,
        path, tmp_path / "kept",
    )  # fmt: skip
    lost(path, tmp_path / "kept")
    assert replayed(path) == (2, [b"new", b"old"])


def test_message_that_is_over_by_its_time_is_not_put_again(path, tmp_path):
    with millstream.open(path) as store:
        store.queue("q", **SMALL)
    run(
        BEGIN + "keep()\n"
        "with store.transaction() as tx: tx.put(q, b'short', ttl=60); tx.put(q, b'long')\n" + DIE,
        path, tmp_path / "kept",
    )  # fmt: skip
    lost(path, tmp_path / "kept")
    with clock() as virtual:
        virtual.advance(61)
        with millstream.open(path) as store:
            assert [m.value for m in store.queue("q").peek(9)] == [b"long"]
    assert replayed(path) == (9, [b"long"])


@pytest.mark.parametrize("other", ["later", "undecided"])
def test_message_is_put_again_where_another_one_has_its_dedup_id(path, tmp_path, other):
    """A later one, whose window began anew; or one of a transaction that never was committed."""
    with millstream.open(path) as store:
        store.queue("q", dedup_window=60, **SMALL)
        store.stream("s")
    twin = tmp_path / "twin"  # where the other one came
    shutil.copytree(path, twin)
    if other == "later":
        code = "q.put(b'later', dedup_id='a'); keep()\n"
    else:
        code = (
            "def end(*_, **__): keep(); os._exit(0)\n"
            "store._transactions.journal().append = end\n"
            "with store.transaction() as tx: tx.put(q, b'never', dedup_id='a')\n"
        )
    run(BEGIN + code + DIE, twin, tmp_path / "kept")
    run(
        BEGIN + "for _ in range(3): q.put(b'over'); q.get().ack()\n"
        "with store.transaction() as tx: tx.append(store.stream('s'), b'x')\n"
        "with store.transaction() as tx: tx.put(q, b'first', dedup_id='a')\n" + DIE,
        path, tmp_path / "unused",
    )  # fmt: skip
    lost(path, tmp_path / "kept")
    begun = time.monotonic()
    assert replayed(path) == (9, [b"first"] + [b"later"] * (other == "later"))
    assert time.monotonic() - begun < LOCK_SECONDS / 2  # nobody is left to wait for


def test_reader_that_was_there_before_copies_what_is_committed_and_not_applied(path, tmp_path):
    """It has no control files of its own: nothing tells it what is applied."""
    with millstream.open(path) as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"before")
    with millstream.open(path, mode="r") as reader:
        run(
            "import os\n"
            "store = millstream.open(sys.argv[1], durability='interval')\n"
            "journal = store._transactions.journal()\n"
            "journal.apply_synced = lambda end: os._exit(0)\n"
            "with store.transaction() as tx: tx.append(store.stream('s'), b'committed')\n",
            path,
        )
        reader.backup(tmp_path / "copy")
    with millstream.open(tmp_path / "copy") as store:
        assert log_of(store.stream("s")) == [b"before", b"committed"]


def test_page_that_is_damaged_under_an_open_store_refuses_commits(path):
    with millstream.open(path) as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    page = path / "streams" / "@journal" / "page"
    whole = page.read_bytes()
    with millstream.open(path) as first:
        second = millstream.open(path)
        with open(page, "r+b") as file:
            file.write(b"rubbish")
        for _ in range(2):
            with (
                pytest.raises(millstream.CorruptBatch, match="in all processes") as raised,
                second.transaction() as tx,
            ):
                tx.append(second.stream("s"), b"y")
            assert raised.value.path == str(page)
        with pytest.raises(millstream.CorruptBatch):
            second.close()  # it cannot see whether all that is committed is applied
        assert second.closed
        assert log_of(first.stream("s")) == [b"x"]
    with millstream.open(path) as store:
        assert page.read_bytes()[:40] == whole[:40]
        with store.transaction() as tx:
            tx.append(store.stream("s"), b"y")
        assert log_of(store.stream("s")) == [b"x", b"y"]


def test_group_whose_sync_failed_keeps_the_records_of_the_journal(path):
    with millstream.open(path, durability="process") as store:
        source = store.stream("in")
        source.append(b"x")
        with source.consumer("g", delivery="exactly_once", timeout=0) as consumer:
            with store.transaction() as tx:
                consumer.poll()
                tx.commit(consumer)
            journal = store._transactions.journal()
            before = journal._page.checkpoint
            consumer.group._set_poison(1)
            with pytest.raises(millstream.Poisoned), journal.holding():
                journal.checkpoint()
            assert (journal._page.checkpoint, journal.stream.first_offset(0)) == (before, 0)
            consumer.group._set_poison(0)
        with journal.holding():
            journal.checkpoint()
        assert journal._page.checkpoint == journal.end > before
