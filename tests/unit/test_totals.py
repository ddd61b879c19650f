"""What a queue counts over its whole life: put, done, failed; and for how long its oldest waits."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import millstream
from millstream.testing import clock


def totals(queue):
    stats = queue.stats()
    return stats.put, stats.done, stats.failed, stats.cancelled


def worked_on(queue):
    """Ten messages: four done, one rejected, one failed once, one cancelled, five left and dead."""
    numbers = queue.put_many([b"%d" % i for i in range(10)])
    queue.ack_many(queue.get_many(4))
    queue.get(timeout=0).reject("no")
    queue.get(timeout=0).nack(delay=0, reason="broken")
    assert queue.cancel(numbers[-1])


def test_totals_are_of_all_that_was_and_go_on_after_a_restart(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        queue = store.queue("mail")
        assert totals(queue) == (0, 0, 0, 0)
        worked_on(queue)
        assert totals(queue) == (10, 4, 2, 1)
    for mode in ("r", "rw"):
        with millstream.open(tmp_path / "store", mode=mode) as store:
            assert totals(store.queue("mail")) == (10, 4, 2, 1)
    with millstream.open(tmp_path / "store") as store:
        queue = store.queue("mail")
        assert (queue.purge(), queue.dead.purge()) == (4, 1)
        assert totals(queue) == (10, 4, 2, 6)


def test_totals_outlive_a_process_that_is_killed(tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import millstream, test_totals
test_totals.worked_on(millstream.open({str(tmp_path / "store")!r}).queue("mail"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    with millstream.open(tmp_path / "store") as store:
        queue = store.queue("mail")
        queue.put(b"of another generation")
        assert totals(queue) == (11, 4, 2, 1)


def test_a_queue_of_before_there_were_totals_begins_with_what_is_there(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        worked_on(store.queue("mail"))
    with open(tmp_path / "store/queues/mail/slots", "r+b") as file:
        file.seek(256)
        file.write(bytes(128))
    with millstream.open(tmp_path / "store", mode="r") as store:
        assert totals(store.queue("mail")) == (0, 0, 0, 0)
    with millstream.open(tmp_path / "store") as store:
        assert totals(store.queue("mail")) == (5, 0, 0, 0)


@pytest.mark.parametrize("field", range(5))
def test_damaged_totals_change_nothing_else(tmp_path, field):
    with millstream.open(tmp_path / "store") as store:
        worked_on(store.queue("mail"))
    with open(tmp_path / "store/queues/mail/slots", "r+b") as file:
        file.seek(256 + 8 * field)
        file.write(b"\xff" * 7 + b"\x7f")
    with millstream.open(tmp_path / "store") as store:
        queue = store.queue("mail")
        stats = queue.stats()
        assert (stats.ready, stats.dead, len(queue)) == (4, 1, 4)
        assert stats.put >= 0 <= stats.done


def test_a_put_that_comes_to_nothing_is_none(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        queue = store.queue("mail", capacity=10, payload_bytes=4096)
        queue.put(b"x" * 4000)
        for _ in range(3):
            with pytest.raises(millstream.QueueFull):
                queue.put(b"x" * 4000, timeout=0)
        assert totals(queue) == (1, 0, 0, 0)
        assert queue.stats().refused == 3
        with pytest.raises(KeyError), store.transaction() as tx:
            tx.put(queue, b"never")
            raise KeyError
        with store.transaction() as tx:
            tx.put(queue, b"put")
            tx.ack(queue.get(timeout=0))
        assert totals(queue) == (2, 1, 0, 0)


def test_totals_never_fall_while_others_work(store):
    queue, seen, over = store.queue("mail"), [], threading.Event()

    def work():
        while not over.is_set():
            queue.put_many([b"x"] * 20)
            queue.ack_many(queue.get_many(20))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    while len(seen) < 200:
        stats = queue.stats()
        seen.append((stats.put, stats.done))
    over.set()
    for worker in workers:
        worker.join()
    for before, after in itertools.pairwise(seen):
        assert before[0] <= after[0] and before[1] <= after[1]
    stats = queue.stats()
    assert stats.put - stats.done == len(queue)
    assert all(done <= put for put, done in seen)


def test_the_oldest_waits_since_it_was_put_or_due_or_failed(tmp_path):
    with clock() as now:
        with millstream.open(tmp_path / "store") as store:
            queue = store.queue("mail", priorities=2)
            assert queue.stats().oldest_age is None
            queue.put(b"old", priority=1)
            now.advance(100)
            queue.put(b"new")
            queue.put(b"newest", priority=1)
            assert queue.stats().oldest_age == pytest.approx(100, abs=1)
        with millstream.open(tmp_path / "store", mode="r") as store:
            assert store.queue("mail").stats().oldest_age == pytest.approx(100, abs=1)
        with millstream.open(tmp_path / "store") as store:  # a restart does not make it young
            queue = store.queue("mail")
            now.advance(60)
            assert queue.stats().oldest_age == pytest.approx(160, abs=1)
            for message in queue.get_many(3):
                message.ack() if message.value != b"old" else message.nack(delay=0)
            now.advance(3)
            assert queue.stats().oldest_age == pytest.approx(3, abs=1)
            queue.get(timeout=0).ack()
            queue.put(b"later", delay=50)
            now.advance(60)
            queue._upkeep()
            assert queue.stats().oldest_age == pytest.approx(10, abs=1)
