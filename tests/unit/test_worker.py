"""Workers: returning acknowledges, raising tries again, the lease lasts meanwhile."""

import sys
import threading
import time

import pytest
import worker_jobs
from timing import until
from worker_steps import QUICK, put_jobs, run

import millstream
from millstream.worker import Counts, Worker

pytestmark = pytest.mark.usefixtures("nothing_is_renewed")


# --- outcomes -------------------------------------------------------------------------------------


def test_messages_are_worked_on_and_acknowledged(queue):
    queue.put_many([b"%d" % i for i in range(100)])
    seen = []
    counts = run(queue, lambda message: seen.append(int(message.value)), concurrency=4)
    assert sorted(seen) == list(range(100))
    assert counts == Counts(done=100)
    assert len(queue) == 0


def test_registration_returns_the_function(queue):
    @queue.worker(concurrency=2)
    def double(number):
        return 2 * number

    assert double(4) == 8


def test_failures_are_retried_and_then_dead(queue):
    queue.put(b"x")
    attempts = []

    def fail(message):
        attempts.append(message.attempt)
        raise RuntimeError("no luck")

    assert run(queue, fail) == Counts(failed=2, dead=1)
    assert attempts == [1, 2]
    (dead,) = queue.dead.list()
    assert "no luck" in dead.last_error


def test_retry_snooze_and_reject_do_what_they_say(store):
    queue = store.queue("q", retry=millstream.RetryPolicy(max_attempts=5, backoff=3600.0))
    ids = queue.put_many([b"retry", b"snooze", b"reject"])
    seen = []

    def work(message):
        seen.append((message.value, message.attempt))
        if message.value == b"reject":
            raise millstream.Reject("not wanted")
        if len([value for value, _ in seen if value == message.value]) > 1:
            return
        raise millstream.Retry(0.0) if message.value == b"retry" else millstream.Snooze(0.0)

    assert run(queue, work) == Counts(done=2, failed=2, dead=1, released=1)
    assert sorted(seen) == [
        (b"reject", 1),
        (b"retry", 1),
        (b"retry", 2),
        (b"snooze", 1),
        (b"snooze", 1),
    ]
    (dead,) = queue.dead.list()
    assert dead.id == ids[2]
    assert "not wanted" in dead.last_error


def test_what_the_function_ended_stays_so(queue):
    queue.put_many([b"ack", b"reject", b"release"])
    released = []

    def work(message):
        if message.value == b"ack":
            message.ack()
        elif message.value == b"reject":
            message.reject("by hand")
        elif not released:
            released.append(message.id)
            message.release()

    assert run(queue, work) == Counts(done=2, failed=1, dead=1, released=1)


def test_ending_a_message_and_then_raising_counts_once(queue):
    queue.put(b"x")

    def work(message):
        message.ack()
        raise RuntimeError("too late")

    assert run(queue, work) == Counts(done=1)
    assert queue.dead.list() == []


def test_message_that_cannot_be_decoded_does_not_stop_the_worker(store):
    raw = store.queue("q")
    raw.put_many([b"1", b"no json", b"2"])
    queue = store.queue("q", codec="json")
    seen = []
    counts = run(queue, lambda message: seen.append(message.value))
    assert seen == [1, 2]
    assert counts == Counts(done=2, failed=1, dead=1)
    (dead,) = queue.dead.list()
    assert "decod" in dead.last_error


@pytest.mark.parametrize("delay", [-1, float("nan"), 1e30, "soon", True])
@pytest.mark.parametrize("kind", [millstream.Retry, millstream.Snooze])
def test_delay_that_makes_no_sense_is_a_failure_of_the_function(store, kind, delay):
    queue = store.queue("q", retry=millstream.RetryPolicy(max_attempts=1))
    queue.put_many([b"in a worker", b"in a with"])

    def ask(message):
        raise kind(delay)

    with pytest.raises((ValueError, TypeError), match="delay"), queue.get() as message:
        ask(message)
    assert run(queue, ask) == Counts(failed=1, dead=1)
    assert ["delay" in dead.last_error for dead in queue.dead.list()] == [True, True]


def test_system_exit_in_a_function_ends_the_run_and_releases(queue):
    queue.put(b"x")

    @queue.worker()
    def leave(message):
        sys.exit(3)

    with pytest.raises(SystemExit):
        millstream.run(queue)
    with queue.get(timeout=60) as message:
        assert message.attempt == 1


# --- batches --------------------------------------------------------------------------------------


def test_batches_are_acknowledged_but_for_the_bad_ones(store):
    queue = store.queue("q", retry=millstream.RetryPolicy(max_attempts=1))
    queue.put_many([b"bad" if i % 10 == 3 else b"good" for i in range(50)])
    sizes = []

    def load(messages):
        sizes.append(len(messages))
        for message in messages:
            if message.value == b"bad":
                message.nack(reason="bad row")

    assert run(queue, load, batch=20) == Counts(done=45, failed=5, dead=5)
    assert max(sizes) == 20
    assert {dead.last_error for dead in queue.dead.list()} == {"bad row"}


def test_batch_that_raises_fails_as_a_whole_and_comes_again_one_by_one(queue):
    queue.put_many([b"good", b"bad", b"good"])
    sizes = []

    def load(messages):
        sizes.append(len(messages))
        if any(message.value == b"bad" for message in messages):
            raise ValueError("a bad row")

    assert run(queue, load, batch=10) == Counts(done=2, failed=4, dead=1)
    assert sizes == [3, 1, 1, 1]


def test_linger_waits_for_more(queue):
    sizes = []
    queue.put(b"x")
    with Worker(queue, lambda messages: sizes.append(len(messages)), batch=3, linger=20.0):
        until(lambda: queue._counts()["leased"] == 1)
        queue.put_many([b"y", b"z"])
        until(lambda: sizes)
    assert sizes == [3]


# --- leases ---------------------------------------------------------------------------------------


def renewed(queue, message, times):
    """Wait until the lease of a message was renewed so often: its word carries the end."""
    words = set()

    def looked():
        words.add(queue._find(message.id)[1])
        return len(words) > times

    until(looked)


def test_lease_is_renewed_while_the_function_runs(store):
    queue = store.queue("q", lease=0.5, retry=QUICK)
    queue.put(b"x")
    attempts = []

    def work(message):
        attempts.append(message.attempt)
        renewed(queue, message, 4)  # one at each third of the lease: it would be over by now
        assert not message.lost

    assert run(queue, work, concurrency=2) == Counts(done=1)
    assert attempts == [1]


def test_lease_is_renewed_while_python_is_busy(store):
    """No other thread of Python runs during this call: the renewal needs none."""
    queue = store.queue("q", lease=0.2, retry=QUICK)
    queue.put(b"x")

    def work(message):
        switch = sys.getswitchinterval()
        sys.setswitchinterval(100.0)
        try:
            end = time.monotonic() + 0.8
            while time.monotonic() < end:
                pass
        finally:
            sys.setswitchinterval(switch)

    assert run(queue, work) == Counts(done=1)


def test_lease_is_not_renewed_after_the_time_limit(store):
    queue = store.queue("q", lease=0.1, retry=QUICK)
    queue.put(b"x")
    attempts = []
    free = threading.Event()

    def work(message):
        attempts.append(message.attempt)
        if message.attempt == 1:
            free.wait(30)
            assert message.lost
        else:
            free.set()

    counts = run(queue, work, concurrency=2, time_limit=0.3)
    assert attempts == [1, 2]
    assert counts == Counts(done=1, failed=1)


def test_message_can_be_extended_while_it_is_renewed(store):
    queue = store.queue("q", lease=0.2)
    queue.put(b"x")

    def work(message):
        message.extend(60)
        assert not message.lost
        message.extend(0.2)
        renewed(queue, message, 4)
        message.ack()

    assert run(queue, work) == Counts(done=1)


# --- what it waits for ----------------------------------------------------------------------------


def test_what_keeps_a_queue_from_being_empty_is_said(store, queue):
    worker = Worker(queue, print)
    assert worker.waits_for == ""
    queue.put(b"ready")
    queue.put(b"later", delay=3600)
    queue.put_many([b"one", b"two"])
    lease = queue.get(timeout=5)
    queue.pause()
    said = worker.waits_for
    assert said.startswith("4 not finished: 2 ready, 1 delayed (until 2")
    assert "1 leased elsewhere; it is paused" in said
    lease.ack()
    ordered = store.queue("o", ordering="key")
    ordered.put_many([millstream.Put(b"%d" % i, key=b"k") for i in range(3)])
    with ordered.get(timeout=5):
        said = Worker(ordered, print).waits_for
        assert (
            said == "3 not finished: 2 held behind an earlier one of their key, 1 leased elsewhere"
        )


def test_run_until_empty_warns_of_what_it_waits_for(queue, monkeypatch, caplog):
    monkeypatch.setattr("millstream.queues.worker.NOTICE_SECONDS", (0.05, 0.1))
    queue.put(b"later", delay=3600)
    (number,) = [message.id for message in queue.peek(1)]
    queue.worker()(print)

    def cancel():
        until(lambda: len(caplog.records) >= 2)
        queue.cancel(number)

    thread = threading.Thread(target=cancel)
    thread.start()
    assert millstream.run(queue, until_empty=True) == Counts()
    thread.join()
    assert "q: run(until_empty=True) waits: 1 not finished: 1 delayed" in caplog.messages[0]


def test_what_is_worked_on_here_is_no_lease_elsewhere(queue, tmp_path):
    begun, free = threading.Event(), threading.Event()

    def work(message):
        begun.set()
        free.wait(60)

    queue.put(b"x")
    with Worker(queue, work) as worker:
        assert begun.wait(60)
        assert worker.waits_for == "1 not finished: 1 worked on here"
        free.set()
    put_jobs(queue, tmp_path, 1)
    with Worker(queue, worker_jobs.slowly, mode="process") as worker:
        until(lambda: worker.held)
        assert worker.waits_for == "1 not finished: 1 worked on here"
        worker.stop(grace=0)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"concurrency": 0}, millstream.InvalidArgument),
        ({"concurrency": "2"}, millstream.InvalidType),
        ({"mode": "fiber"}, millstream.InvalidArgument),
        ({"time_limit": 0}, millstream.InvalidArgument),
        ({"time_limit": None}, millstream.InvalidType),
        ({"batch": 0}, millstream.InvalidArgument),
        ({"linger": -1}, millstream.InvalidArgument),
    ],
)
def test_options_that_make_no_sense_are_refused(queue, options, error):
    with pytest.raises(error):
        queue.worker(**options)
    with pytest.raises(error):
        Worker(queue, print, **options)


def test_what_cannot_be_called_is_refused(queue):
    async def later(message):
        pass

    for wrong in (later, 3, None):
        with pytest.raises(millstream.InvalidType):
            Worker(queue, wrong)


def test_run_without_workers_is_refused(queue):
    with pytest.raises(millstream.InvalidArgument, match="q"):
        millstream.run(queue)
    with pytest.raises(millstream.InvalidArgument):
        millstream.run()


def test_counts_say_it_in_words():
    assert str(Counts(1, 2, 1, 3)) == "1 done, 2 failed (1 of them dead), 3 released"
    assert Counts(1) + Counts(0, 1) == Counts(1, 1)


def test_a_failure_is_logged_with_what_when_and_what_next(store, caplog):
    queue = store.queue("mail", retry=QUICK)
    number = queue.put(b"x")

    def broken(message):
        raise ZeroDivisionError("in the function")

    with Worker(queue, broken):
        until(lambda: len(queue.dead) == 1)
    first, second = caplog.messages
    begin = f"mail: message {number}, attempt {{}} of 2: ZeroDivisionError('in the function')"
    assert first.startswith(begin.format(1) + "; again in 0 s, at 20")
    assert second == begin.format(2) + "; a dead letter now"
    assert "in broken" in caplog.text
    (letter,) = queue.dead.list()
    assert letter.last_error == "ZeroDivisionError('in the function')"
    assert letter.traceback.startswith("Traceback (most recent call last):")
    assert letter.traceback.endswith("ZeroDivisionError: in the function\n")
    assert "in broken" in queue.dead.peek(number).traceback


def test_tracebacks_of_dead_letters_are_kept_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("millstream.queues.tracebacks.FILE_MAX", 20_000)
    with millstream.open(tmp_path / "store") as store:
        queue = store.queue("mail", retry=millstream.RetryPolicy(max_attempts=1))
        for index in range(12):
            queue.put(b"x")
            with pytest.raises(RuntimeError), queue.get(timeout=0):
                raise RuntimeError(f"number {index} " + "x" * 5000)
        queue.put(b"x")
        with queue.get(timeout=0):
            raise millstream.Reject("unwanted")
        with open(tmp_path / "store/queues/mail/tracebacks", "ab") as file:
            file.write(b'{"id": 1, "trace')  # somebody was killed there
        store.queue("mail").put(b"y")
        with pytest.raises(KeyError), queue.get(timeout=0):
            raise KeyError("after it")
        store.backup(tmp_path / "copy")
    for name in ("store", "copy"):
        with millstream.open(tmp_path / name, mode="r") as store:
            texts = [letter.traceback for letter in store.queue("mail").dead.list()]
            assert texts[-1].endswith("KeyError: 'after it'\n")
            assert texts[-2].endswith("Reject: unwanted\n")
            assert f"number {11}" in texts[11] and not texts[0]
        kept = sum(path.stat().st_size for path in (tmp_path / name).rglob("tracebacks*"))
        assert kept < 60_000
