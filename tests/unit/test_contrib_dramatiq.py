"""`contrib.dramatiq` with real workers, and where it promises more than dramatiq's brokers."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest

import millstream

pytest.importorskip("dramatiq")

import dramatiq
from dramatiq.rate_limits import Barrier, ConcurrentRateLimiter, WindowRateLimiter
from dramatiq.results import ResultFailure, ResultMissing, Results, ResultTimeout

from millstream.contrib.dramatiq import (
    MillstreamBroker,
    MillstreamRateLimiterBackend,
    MillstreamResultBackend,
)


@pytest.fixture
def make(tmp_path):
    """A function that makes one of our three in one store, as its processes do."""
    made = []

    def make(kind=MillstreamBroker, **options):
        options = {"path": tmp_path / "store", "durability": "process", **options}
        made.append(kind(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def broker(make):
    broker = make()
    dramatiq.set_broker(broker)
    yield broker
    dramatiq.set_broker(None)


@pytest.fixture
def results(make, broker):
    results = make(MillstreamResultBackend)
    broker.add_middleware(Results(backend=results))
    return results


@pytest.fixture
def limits(make):
    return make(MillstreamRateLimiterBackend)


@contextmanager
def worker(broker, threads=1):
    running = dramatiq.Worker(broker, worker_threads=threads, worker_timeout=20)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def run(program, path):
    """A program with an actor `wait` that says that it runs, and its `broker` in `path`."""
    head = """
        import os, signal, sys
        import dramatiq
        from millstream.contrib.dramatiq import *

        path = os.environ["DATA"]
        broker = MillstreamBroker(path, durability="process")
        dramatiq.set_broker(broker)

        @dramatiq.actor
        def wait():
            os.write(1, b"runs\\n")
            signal.pause()
    """
    code = textwrap.dedent(head) + textwrap.dedent(program)
    env = {**os.environ, "DATA": str(path)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


# --- messages -------------------------------------------------------------------------------------


def test_a_message_is_off_the_queue_when_its_actor_has_returned(broker):
    seen = []

    @dramatiq.actor
    def look():
        seen.append(broker.queue("default").stats().leased)

    look.send()
    with worker(broker):
        broker.join("default", timeout=60_000)
    assert seen == [1]


def test_a_delayed_message_waits_in_the_store_and_in_no_worker(broker):
    ran = threading.Event()
    later = dramatiq.actor(actor_name="later")(ran.set)
    later.send_with_options(delay=400)
    sent = time.monotonic()
    with worker(broker) as running:
        assert list(running.consumers) == ["default"]  # there is none for delayed ones
        while (stats := broker.queue("default").stats()).delayed:
            assert stats.leased == 0
        assert ran.wait(60)
        assert time.monotonic() - sent >= 0.4
        broker.join("default", timeout=60_000)


def test_a_message_with_an_eta_waits_in_the_store_too(broker):
    late = dramatiq.actor(actor_name="late")(print)
    late.send_with_options(eta=int(time.time() * 1000) + 600_000)
    broker.enqueue(late.message().copy(queue_name="default.DQ", options={"eta": "no number"}))
    stats = broker.queue("default").stats()
    assert (stats.delayed, stats.ready) == (1, 1)
    assert [b"eta" in one.value for one in broker.queue("default").peek(2)] == [False, False]


def test_what_is_more_urgent_comes_first_whatever_its_number(broker):
    order = [-5, 0, 1, 3, 7, 15, 50, 1000]
    for priority in reversed(order):
        dramatiq.actor(actor_name=f"of {priority}", priority=priority)(print).send()
    found = [re.search(rb"of (-?\d+)", one.value)[1] for one in broker.queue("default").peek(8)]
    assert [int(one) for one in found] == order


def test_a_worker_fetches_no_more_than_it_may(broker):
    go = threading.Event()
    dramatiq.actor(actor_name="one")(lambda: go.wait(60) and None)
    for _ in range(9):
        broker.get_actor("one").send()
    with worker(broker, threads=2):
        deadline = time.monotonic() + 60
        while (stats := broker.queue("default").stats()).leased < 4:
            assert time.monotonic() < deadline
        assert (stats.leased, stats.ready) == (4, 5)
        go.set()
        broker.join("default", timeout=60_000)


def test_a_worker_that_stops_gives_back_what_it_has_not_begun(broker):
    begun, go = threading.Event(), threading.Event()

    @dramatiq.actor
    def one():
        begun.set()
        go.wait(60)

    one.send()
    one.send()
    with worker(broker):
        assert begun.wait(60)
        threading.Timer(0.1, go.set).start()
    stats = broker.queue("default").stats()
    assert (stats.ready, stats.leased, stats.redelivered) == (1, 0, 0)
    assert broker.queue("default").get(timeout=60).attempt == 1


def test_one_that_fails_is_tried_again_as_dramatiq_says_and_is_a_dead_letter_then(broker):
    tried = []

    @dramatiq.actor(max_retries=2, min_backoff=1, max_backoff=5)
    def fail(word):
        tried.append(word)
        raise ValueError("no")

    fail.send("x")
    with worker(broker):
        broker.join("default", timeout=60_000)
        (letter,) = broker.queue("default").dead.list()
        assert letter.last_error == "ValueError('no')"
        assert [one.actor_name for one in broker.dead_letters] == ["fail"]
        with pytest.raises(ValueError, match="no"):
            broker.join("default", fail_fast=True)
        assert broker.queue("default").dead.redrive() == 1
        broker.join("default", timeout=60_000)
    assert tried == ["x"] * 4
    (letter,) = broker.queue("default").dead.list()
    assert 'raise ValueError("no")' in letter.traceback


def test_what_is_no_message_is_a_dead_letter_and_the_next_runs(broker):
    ran = []
    dramatiq.actor(actor_name="one")(lambda: ran.append(1))
    broker.queue("default").put(b"not a message")
    broker.get_actor("one").send()
    with worker(broker):
        broker.join("default", timeout=60_000)
    assert ran == [1]
    (letter,) = broker.queue("default").dead.list()
    assert "no message of dramatiq" in letter.last_error
    assert broker.dead_letters == []


def test_one_whose_actor_is_not_known_is_a_dead_letter(broker):
    broker.declare_queue("default")
    broker.enqueue(dramatiq.Message("default", "nobody", (), {}, {}))
    with worker(broker):
        broker.join("default", timeout=60_000)
    with pytest.raises(dramatiq.ActorNotFound, match="nobody"):
        broker.join("default", fail_fast=True)


def test_join_and_flush(broker):
    one = dramatiq.actor(actor_name="one")(print)
    one.send()
    one.send_with_options(delay=600_000)
    with pytest.raises(dramatiq.QueueJoinTimeout):
        broker.join("default", timeout=10)
    broker.flush_all()
    broker.join("default", timeout=60_000)
    broker.queue("default").put(b"x")
    broker.queue("default").get().reject("no")
    broker.flush("default")
    assert broker.dead_letters == []


# --- what is worth more than dramatiq's brokers ---------------------------------------------------


@pytest.mark.parametrize("end", ["middleware", "all"])
def test_a_message_is_tried_again_where_what_follows_it_could_not_be_put(
    broker, monkeypatch, caplog, end
):
    monkeypatch.setattr("millstream.contrib.dramatiq.PUT_SECONDS", 0.01)
    monkeypatch.setattr("millstream.contrib.dramatiq.AGAIN_SECONDS", 0.0)
    full = [millstream.QueueFull("no room")]
    put, ran = MillstreamBroker._put, []

    def put_or_raise(self, queue_name, data, **options):
        if full and ran:
            raise full[0] if end == "all" else full.pop()
        put(self, queue_name, data, **options)

    monkeypatch.setattr(MillstreamBroker, "_put", put_or_raise)
    first = dramatiq.actor(actor_name="first")(lambda: ran.append("first") or 1)
    then = dramatiq.actor(actor_name="then")(lambda _: ran.append("then"))
    if end == "all":
        full[0] = millstream.LimitExceeded("too long")
    (first.message() | then.message()).run()
    with worker(broker):
        broker.join("default", timeout=60_000)
    if end == "all":  # it never can be put
        assert ran == ["first"]
        assert "too long" in broker.queue("default").dead.list()[0].last_error
    else:
        assert ran == ["first", "first", "then"]


def test_a_message_of_a_killed_worker_process_comes_back(broker, tmp_path):
    program = """
        from dramatiq import cli
        sys.modules["program"] = sys.modules["__main__"]
        wait.send()
        command = ["program:broker", "-p", "1", "-t", "1", "--log-file", os.devnull]
        cli.main(cli.make_argument_parser().parse_args(command))
    """
    broker.declare_queue("default")
    with run(program, tmp_path / "store") as running:
        assert running.stdout.readline() == "runs\n"
        children = subprocess.run(
            ["pgrep", "-P", str(running.pid)], capture_output=True, text=True
        ).stdout.split()
        assert broker.queue("default").stats().leased == 1
        running.kill()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        running.stdout.close()
    again = broker.queue("default").get(timeout=60)
    assert again.attempt == 2
    assert dramatiq.Message.decode(again.value).actor_name == "wait"


def test_the_lease_of_a_long_task_is_renewed(make, broker):
    mine = make(lease=0.3, namespace="short")
    entered, leave = threading.Event(), threading.Event()

    @dramatiq.actor(broker=mine)
    def long():
        entered.set()
        leave.wait(60)

    long.send()
    with worker(mine):
        assert entered.wait(60)
        assert mine.queue("default").get_many(1, timeout=1.0) == []  # three leases
        leave.set()
        mine.join("default", timeout=60_000)


def test_one_whose_lease_is_over_is_said_to_come_again(make, broker, caplog):
    dramatiq.actor(actor_name="one")(print).send()
    consumer = broker.consume("default", timeout=60_000)
    message = next(consumer)
    with millstream.testing.clock() as clock:
        clock.advance(61)
        again = broker.queue("default").get(timeout=60)
        consumer.ack(message)
    assert "it is delivered again" in caplog.text
    again.ack()


def test_a_queue_that_was_dropped_is_made_anew(broker, make):
    one = dramatiq.actor(actor_name="one")(print)
    with millstream.open(broker.path) as store:
        store.drop_queue("dramatiq.default")
    one.send()
    assert broker.queue("default").stats().ready == 1
    consumer = broker.consume("default", timeout=10)
    with millstream.open(broker.path) as store:
        store.drop_queue("dramatiq.default")
    with pytest.raises(dramatiq.ConnectionClosed):
        next(consumer)
    assert next(broker.consume("default", timeout=10)) is None


def test_a_forked_process_opens_the_store_again(broker, results, limits):
    one = dramatiq.actor(actor_name="one")(print)
    limits.add("key", 1, 60_000)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            message = one.send()
            results.store_result(message, 5, 60_000)
            assert limits.incr("key", 1, 5, 60_000)
            broker.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    message = next(broker.consume("default", timeout=60_000))
    assert results.get_result(message) == 5
    assert not limits.incr("key", 1, 2, 60_000)


# --- results --------------------------------------------------------------------------------------


def test_results_come_missing_late_and_failed(broker, results):
    @dramatiq.actor(store_results=True, max_retries=0)
    def divide(a, b):
        return a // b

    good, bad = divide.send(6, 3), divide.send(1, 0)
    with pytest.raises(ResultMissing):
        good.get_result()
    with pytest.raises(ResultTimeout):
        good.get_result(block=True, timeout=10)
    with worker(broker):
        assert good.get_result(block=True, timeout=60_000) == 2
        with pytest.raises(ResultFailure, match="ZeroDivisionError"):
            bad.get_result(block=True, timeout=60_000)


def test_a_result_wakes_who_waits_in_another_process(results, tmp_path):
    message = dramatiq.Message("default", "one", (), {}, {}, message_id="of a message")
    program = """
        results = MillstreamResultBackend(path)
        os.write(1, b"waits\\n")
        message = dramatiq.Message("default", "one", (), {}, {}, message_id="of a message")
        print(results.get_result(message, block=True, timeout=60_000))
    """
    with run(program, tmp_path / "store") as waiter:
        assert waiter.stdout.readline() == "waits\n"
        results.store_result(message, 7, 60_000)
        assert waiter.communicate(timeout=60)[0] == "7\n"


def test_a_result_lasts_for_its_time_and_the_stream_for_the_longest(make, results, monkeypatch):
    stream = results._rows.stream
    messages = [dramatiq.Message("default", "one", (n,), {}, {}) for n in range(3)]
    for message, hours in zip(messages, (1, 5, 2), strict=True):
        results.store_result(message, hours, hours * 3_600_000)
    assert stream.retention.age == 5 * 3600
    later = time.time() + 4 * 3600
    monkeypatch.setattr("millstream.contrib.rows.time.time", lambda: later)
    found = []
    for message in messages:
        try:
            found.append(results.get_result(message))
        except ResultMissing:
            found.append(None)
    assert found == [None, 5, None]


def test_who_asks_forgets_what_has_expired(results, monkeypatch):
    monkeypatch.setattr("millstream.contrib.rows.PRUNED_LEAST", 10)
    rows = results._rows
    rows._many = 10
    for number in range(30):
        rows.put(b"%d" % number, b"", 1.0 if number < 25 else 3600.0)
    later = time.time() + 60
    monkeypatch.setattr("millstream.contrib.rows.time.time", lambda: later)
    rows.catch_up()
    assert sorted(rows._at) == [b"25", b"26", b"27", b"28", b"29"]
    assert rows.get(b"29") == b""


# --- rate limits ----------------------------------------------------------------------------------


def test_counts_have_bounds_and_times(limits, monkeypatch):
    assert limits.add("a", 1, 10_000)
    assert not limits.add("a", 5, 10_000)
    assert limits.incr("a", 2, 3, 10_000)
    assert not limits.incr("a", 1, 3, 10_000)
    assert limits.decr("a", 3, 0, 10_000)
    assert not limits.decr("a", 1, 0, 10_000)
    assert limits.incr_and_sum("b", lambda: ["a", "b"], 2, 2, 10_000)
    assert not limits.incr_and_sum("a", lambda: ["a", "b"], 1, 2, 10_000)
    later = time.time() + 11
    monkeypatch.setattr("millstream.contrib.rows.time.time", lambda: later)
    assert limits.add("a", 5, 10_000)


RACE = """
    limits = MillstreamRateLimiterBackend(path)
    print(sum(limits.add(f"key {n}", 1, 600_000) for n in range(200)))
    print(sum(limits.incr("all", 1, 500, 600_000) for n in range(200)))
    print(sum(limits.incr_and_sum("sum", lambda: ["sum"], 1, 500, 600_000) for n in range(200)))
"""


def test_counts_are_atomic_between_processes(limits, tmp_path):
    racers = [run(RACE, tmp_path / "store") for _ in range(3)]
    printed = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 3
    assert [sum(map(int, column)) for column in zip(*printed, strict=True)] == [200, 500, 500]


def test_what_a_killed_process_has_counted_stays(limits, tmp_path):
    program = """
        from dramatiq.rate_limits import ConcurrentRateLimiter
        limits = MillstreamRateLimiterBackend(path)
        with ConcurrentRateLimiter(limits, "mutex", ttl=600_000).acquire():
            wait()
    """
    with run(program, tmp_path / "store") as holder:
        assert holder.stdout.readline() == "runs\n"
        holder.kill()
    with ConcurrentRateLimiter(limits, "mutex").acquire(raise_on_failure=False) as acquired:
        assert not acquired


def test_limiters_and_barriers_of_dramatiq(limits, tmp_path):
    window = WindowRateLimiter(limits, "window", limit=2, window=60)
    taken = []
    for _ in range(3):
        with window.acquire(raise_on_failure=False) as acquired:
            taken.append(acquired)
    assert taken == [True, True, False]
    barrier = Barrier(limits, "barrier", ttl=600_000)
    assert barrier.create(parties=2)
    program = """
        from dramatiq.rate_limits import Barrier
        barrier = Barrier(MillstreamRateLimiterBackend(path), "barrier", ttl=600_000)
        os.write(1, b"waits\\n")
        print(barrier.wait(timeout=60_000))
    """
    with run(program, tmp_path / "store") as party:
        assert party.stdout.readline() == "waits\n"
        assert not limits.wait("barrier@events", 10)
        deadline = time.monotonic() + 60
        while limits._rows.get(b"barrier") != b"1" and time.monotonic() < deadline:
            limits._rows.wait(60.0)
        assert barrier.wait(block=False)
        assert party.communicate(timeout=60)[0] == "True\n"
    assert limits.wait("barrier@events", 10)  # who comes late as well


# --- what is refused at start-up ------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [MillstreamBroker, MillstreamResultBackend, MillstreamRateLimiterBackend]
)
def test_a_path_that_is_no_store_is_refused(tmp_path, kind):
    with pytest.raises(millstream.InvalidArgument, match=rf"{kind.__name__}\(None\).*directory"):
        kind(None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(millstream.StorageError, match="is not a directory"):
        kind(tmp_path / "file")
    with pytest.raises(millstream.InvalidArgument, match="my app"):
        made = kind(tmp_path / "store", namespace="my app")
        made.declare_queue("default")


def test_a_path_is_one_place_wherever_the_program_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broker = MillstreamBroker("store")
    monkeypatch.chdir("/")
    assert broker.path == str(tmp_path / "store")
    broker.close()
    broker.close()


def test_other_settings_than_stored_are_refused_when_an_actor_is_declared(make):
    make(lease=60.0).declare_queue("default")
    other = make(lease=5.0)
    with pytest.raises(millstream.ConfigMismatch, match="lease"):
        dramatiq.actor(broker=other)(print)
    assert other.get_declared_queues() == set()


def test_a_stream_of_others_is_refused(make):
    with millstream.open(make().path) as store:
        store.stream("dramatiq-results", partitions=3)
    with pytest.raises(millstream.ConfigMismatch, match="partitions"):
        make(MillstreamResultBackend)


@pytest.mark.parametrize("name", ["some queue", "x" * 130])
def test_a_queue_whose_name_is_none_is_refused(broker, name):
    with pytest.raises(millstream.InvalidArgument, match="name"):
        broker.declare_queue(name)
    assert broker.get_declared_queues() == set()


def test_a_queue_that_was_not_declared_is_refused(broker):
    message = dramatiq.Message("nowhere", "one", (), {}, {})
    for call in (
        lambda: broker.enqueue(message),
        lambda: broker.consume("nowhere"),
        lambda: broker.join("nowhere"),
        lambda: broker.flush("nowhere"),
    ):
        with pytest.raises(dramatiq.QueueNotFound, match="nowhere"):
            call()


def test_priorities_of_rabbitmq_are_refused_when_an_actor_is_declared(broker):
    with pytest.raises(ValueError, match="undefined: broker_priority"):
        dramatiq.actor(broker_priority=5)(print)


def test_a_full_queue_refuses(make, monkeypatch):
    monkeypatch.setattr("millstream.contrib.dramatiq.PUT_SECONDS", 0.01)
    one = dramatiq.actor(broker=make(capacity=1))(print)
    one.send()
    with pytest.raises(millstream.QueueFull):
        one.send()


def test_two_of_one_store_share_it_and_the_last_closes_it(tmp_path):
    broker = MillstreamBroker(tmp_path / "store")
    results = MillstreamResultBackend(tmp_path / "store")
    assert broker._share._joined is results._share._joined
    broker.close()
    results.store_result(dramatiq.Message("default", "one", (), {}, {}), 1, 1000)
    results.close()
    assert results._share.store.closed
