"""Nobody waits for a committer that is dead, stopped or interrupted, nor for what it prepared."""

import contextlib
import signal
import threading
import time
import warnings
from random import Random

import pytest
from timing import SOON, until
from transaction_steps import log_of, run

import millstream


def test_plain_put_does_not_wait_for_the_dedup_id_of_a_dead_committer(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q", dedup_window=60.0)
        code = (
            "import os\n"
            "store = millstream.open(sys.argv[1])\n"
            "q = store.queue('q')\n"
            "page = store._transactions.journal()._page\n"
            "page.word(store.session.members, 'x', 1.0).__enter__()\n"
            "q._prepare_put(5, 0, b'never', dedup_id='d')\n"
            "os._exit(0)\n"
        )
        run(code, store.path)
        began = time.monotonic()
        q.put(b"mine", dedup_id="d", timeout=60)
        assert time.monotonic() - began < SOON
        assert [m.value for m in q.get_many(9)] == [b"mine"]
        q._check()


def test_what_a_dead_committer_prepared_is_withdrawn_by_who_waits(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q", ordering="key")
        q.put(b"leased", key=b"a")
        code = (
            "import os\n"
            "store = millstream.open(sys.argv[1])\n"
            "q = store.queue('q')\n"
            "m = q.get()\n"
            "page = store._transactions.journal()._page\n"
            "page.word(store.session.members, 'x', 1.0).__enter__()\n"
            "q._prepare_put(5, 0, b'never', key=b'b')\n"
            "q._prepare_ack(5, m)\n"
            "os._exit(0)\n"
        )
        run(code, store.path)
        q.put(b"behind", key=b"b")
        found = [q.get(timeout=60).value for _ in range(2)]
        assert sorted(found) == [b"behind", b"leased"]
        q._check()


def test_reader_does_not_wait_for_a_committer_that_is_stopped(store):
    source = store.stream("in", partitions=2)
    for partition in range(2):
        source.append(b"%d" % partition, partition=partition)
    journal = store._transactions.journal()
    stopped = source.consumer("g", delivery="exactly_once")
    first = list(stopped.poll().values)
    others = [[value] for value in (b"0", b"1") if value not in first]
    with journal.holding():
        stopped._member.prepare(journal.number_of(journal.end))
        stopped.close()
        with source.consumer("g", delivery="exactly_once") as consumer:
            began = time.monotonic()
            assert [list(consumer.poll().values)] == others
            assert consumer.poll() is None
            assert time.monotonic() - began < SOON
            journal.holding().release()
            assert list(consumer.poll(5).values) == first
            journal.holding().take(1)


def test_closing_does_not_wait_for_a_thread_that_waits_for_it(tmp_path):
    """It has the journal, and opens what its transaction names: the store's lock is next."""
    store = millstream.open(tmp_path / "store", durability="process")
    s, other = store.stream("s"), store.stream("other")
    journal, raised = store._transactions.journal(), []
    at_it, opened = threading.Event(), journal.applier.stream

    def waits(place):
        at_it.set()
        time.sleep(0.3)  # meanwhile the store is being closed
        return opened(place)

    journal.applier.stream = waits

    def work():
        try:
            with store.transaction() as tx:
                tx.append(s, b"1")
                tx.append(other, b"2")
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert at_it.wait(10)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with contextlib.suppress(millstream.LockTimeout):
            store.close()
    assert time.monotonic() - began < SOON
    thread.join(60)
    assert not thread.is_alive()
    with millstream.open(tmp_path / "store") as again:
        assert [log_of(again.stream(name)) for name in ("s", "other")] == [[b"1"], [b"2"]]


DIES_BEHIND_ITS_RECORD = """
import os
from millstream.transactions import journal
store = millstream.open(sys.argv[1], durability=sys.argv[2])
s = store.stream('s', partitions=2)
def dies(*arguments):
    os._exit(0)
for name in ('apply_own', 'apply_synced', *(['sync'] if sys.argv[3] == 'unsynced' else [])):
    setattr(journal.Journal, name, dies)
with store.transaction() as tx:
    tx.append_many(s, [b'0', b'1'], partition=0)
    tx.append(s, b'2', partition=1)
"""


@pytest.mark.parametrize("way", ["follow", "poll", "consumer"])
@pytest.mark.parametrize("death", ["process unsynced", "sync unsynced", "sync synced"])
def test_readers_see_soon_what_a_dead_committer_had_committed(tmp_path, way, death):
    """Nobody commits, opens or closes: a process that has the store open applies it."""
    level, when = death.split()
    with millstream.open(tmp_path / "store", durability=level) as store:
        s = store.stream("s", partitions=2)
        assert log_of(s) == []
        run(DIES_BEHIND_ITS_RECORD, store.path, level, when)
        began = time.monotonic()
        found = []
        if way == "follow":
            for batch in s.read(follow=True, timeout=60):
                found += batch.values
                if len(found) == 3:
                    break
        elif way == "poll":
            until(lambda: len(log_of(s)) == 3)
            found = log_of(s)
        else:
            with s.consumer("g", timeout=60) as consumer:
                for batch in consumer:
                    found += batch.values
                    if len(found) == 3:
                        break
        assert sorted(found) == [b"0", b"1", b"2"]
        assert time.monotonic() - began < SOON
        assert store._transactions.journal().is_applied


def test_interrupts_leave_neither_words_nor_halves(tmp_path):
    """Ctrl-C at any moment of many commits: all or nothing, and the next one goes on."""
    store = millstream.open(tmp_path / "store", durability="process")
    s, q, other = store.stream("s"), store.queue("q"), store.stream("other")
    random, interrupts, tried = Random(7), 0, 0

    def commit(number):
        with store.transaction() as tx:
            tx.append(s, b"%d" % number)
            tx.put(q, b"%d" % number)
            tx.append(other, b"%d" % number)

    commit(0)  # imports what is imported late, which an interrupt may not hit
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    until = time.monotonic() + 2.0
    try:
        while time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
                for _ in range(20):
                    tried += 1
                    commit(tried)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            assert store._transactions.journal().holding().value == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    commit(tried + 1)
    q._decide_undecided()
    found = [m.value for m in q.get_many(1 << 20)]
    lists = [log_of(s), log_of(other), found]
    lost = set(lists[0]) ^ set(lists[1]) | set(lists[0]) ^ set(found)
    twice = [len(one) - len(set(one)) for one in lists]
    print(
        f"transactions tried={tried} interrupted={interrupts} lost={len(lost)} twice={twice} seed=7"
    )
    assert (lost, twice, q._counts()["prepared"]) == (set(), [0, 0, 0], 0)
    assert interrupts > 50
    q._check()
    store.close()
