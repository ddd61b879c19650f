"""Celery over a store: real workers, of processes and of threads; results; killed workers."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

pytest.importorskip("celery")

from celery import chain, chord, group
from celery.exceptions import TaskRevokedError, TimeoutError
from celery_app import make
from contrib_steps import install
from test_clocks import HOUR, Machine
from timing import SOON, until

import millstream
import millstream.contrib.celery

LONG = 60.0
HERE = os.path.dirname(__file__)


def environment(directory, **more):
    """What a process needs to import `celery_app`, with its store in this directory."""
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    url = f"millstream://{directory}/store"
    return {**os.environ, "CELERY_URL": url, "PYTHONPATH": path, **more}


@contextmanager
def working(directory, *options, app="celery_app", ready=True, **more):
    """A real worker, until the block ends; its log is `directory/log`."""
    log = directory / f"log-{time.monotonic_ns()}"
    command = [sys.executable, "-W", "ignore", "-m", "celery", "-A", app, "worker", "-l", "INFO"]
    with log.open("w") as file:
        worker = subprocess.Popen(
            [*command, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(directory, **more),
            cwd=directory,
            start_new_session=True,
        )
    worker.log = log
    try:
        if ready:
            until(lambda: " ready." in log.read_text() or worker.poll() is not None, "the worker")
            assert worker.poll() is None, log.read_text()
        yield worker
    finally:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
            try:
                worker.wait(SOON)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def kill(worker):
    """The worker and its children, as by a power cut of theirs alone."""
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


@contextmanager
def client(directory):
    app = make(f"millstream://{directory}/store")
    app.backend  # noqa: B018, opens the store
    try:
        yield app
    finally:
        app.close()
        app.backend._broker.store.close()


@pytest.fixture(scope="module", params=["prefork", "threads"])
def place(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with working(directory, "-P", request.param, "-c", "2", "-n", "w1@test"):
        yield directory


@pytest.fixture(scope="module")
def app(place):
    with client(place) as made:
        yield made


@pytest.fixture
def own(tmp_path):
    with client(tmp_path) as made:
        yield made


# --- tasks ----------------------------------------------------------------------------------------


def test_a_task_and_its_result(app):
    result = app.tasks["add"].delay(2, 3)
    assert result.get(timeout=LONG) == 5
    assert result.state == "SUCCESS"
    result.forget()
    assert app.AsyncResult(result.id).state == "PENDING"


def test_a_result_that_does_not_come(app):
    with pytest.raises(TimeoutError):
        app.AsyncResult("00000000-none").get(timeout=0.05)


def test_a_failure_with_its_traceback(app):
    result = app.tasks["fail"].delay("broken")
    with pytest.raises(ValueError, match="broken"):
        result.get(timeout=LONG)
    assert result.state == "FAILURE"
    assert "raise ValueError(text)" in result.traceback


def test_chains(app):
    add = app.tasks["add"]
    assert chain(add.s(1, 2), add.s(3), add.s(4))().get(timeout=LONG) == 10


def test_groups(app):
    add = app.tasks["add"]
    result = group(add.s(number, number) for number in range(50))()
    assert result.get(timeout=LONG) == [2 * number for number in range(50)]
    result.save()
    assert app.GroupResult.restore(result.id).completed_count() == 50
    result.delete()
    assert app.GroupResult.restore(result.id) is None


def test_chords(app):
    add, total = app.tasks["add"], app.tasks["total"]
    results = [chord([add.s(n, number) for n in range(10)])(total.s()) for number in range(5)]
    assert [one.get(timeout=LONG) for one in results] == [45 + 10 * number for number in range(5)]
    assert chain(group(add.s(1, 1), add.s(2, 2)), total.s())().get(timeout=LONG) == 6


def test_a_chord_gives_its_results_in_the_order_of_its_header(app):
    add, nested = app.tasks["add"], app.tasks["nested"]
    header = [add.s(number, 0) for number in range(20)]
    assert chord(header)(nested.s()).get(timeout=LONG) == list(range(20))
    # Celery makes one header of nested groups (and turns the order within them round).
    header = [add.s(1, 0), group(add.s(2, 0), add.s(3, 0)), add.s(4, 0)]
    assert sorted(chord(header)(nested.s()).get(timeout=LONG)) == [1, 2, 3, 4]
    header = [chain(add.s(1, 0), add.s(1)), chord([add.s(1, 1), add.s(2, 2)], nested.s())]
    assert chord(header)(nested.s()).get(timeout=LONG) == [2, [2, 4]]


def test_a_chord_with_a_part_that_fails(app):
    add, fail, total = app.tasks["add"], app.tasks["fail"], app.tasks["total"]
    result = chord([add.s(1, 1), fail.s("part")])(total.s())
    with pytest.raises(Exception, match="part"):
        result.get(timeout=LONG)
    until(lambda: result.state == "FAILURE", "the callback's failure")


def test_retries(app):
    assert app.tasks["again"].delay(3).get(timeout=LONG) == 3


def test_priorities_and_redelivery_are_told(app):
    info, _ = app.tasks["about"].apply_async(priority=7).get(timeout=LONG)
    assert info["priority"] == 7
    assert not info["redelivered"]


def test_a_countdown_is_kept(app):
    began = time.monotonic()
    _, eta = app.tasks["about"].apply_async(countdown=0.5).get(timeout=LONG)
    assert time.monotonic() - began >= 0.5
    assert eta is not None


def test_no_worker_holds_a_task_before_its_time(app):
    add = app.tasks["add"]
    eta = datetime.now(UTC) + timedelta(hours=3)
    for number in range(20):
        add.apply_async((number, 0), eta=eta)
    assert add.delay(1, 1).get(timeout=LONG) == 2  # the worker looked at its queue since
    queue = app.backend._broker.store.queue("celery")
    until(lambda: queue.stats().leased == 0, "acknowledging")  # it may follow the result
    assert queue.stats().delayed == 20
    inspect = app.control.inspect(timeout=LONG, limit=1)
    assert inspect.scheduled() == {"w1@test": []}
    assert inspect.reserved() == {"w1@test": []}
    assert app.control.purge() == 20


def test_an_expired_task_is_revoked(app, place):
    result = app.tasks["add"].apply_async((1, 1), expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(TaskRevokedError):
        result.get(timeout=LONG)


def test_reject_and_requeue(app, tmp_path):
    path = tmp_path / "tries"
    app.tasks["refuse"].delay(str(path), False)
    store = app.backend._broker.store
    until(lambda: store.queue("celery").stats().dead == 1, "the dead letter")
    assert path.read_text() == "tried\n"
    store.queue("celery").dead.purge()


# --- remote control -------------------------------------------------------------------------------


def test_inspect(app):
    inspect = app.control.inspect(timeout=LONG, limit=1)
    assert inspect.ping() == {"w1@test": {"ok": "pong"}}
    assert "add" in inspect.registered()["w1@test"]
    stats = inspect.stats()["w1@test"]
    assert stats["broker"]["transport"] == "millstream"
    (queue,) = inspect.active_queues()["w1@test"]
    assert queue["name"] == "celery"


def test_control(app):
    def told(command, **arguments):
        (reply,) = app.control.broadcast(command, arguments, reply=True, timeout=LONG, limit=1)
        return reply["w1@test"]

    assert "ok" in told("rate_limit", task_name="add", rate_limit="1000/s")
    assert "ok" in told("rate_limit", task_name="add", rate_limit=0)
    assert "ok" in told("add_consumer", queue="other")
    assert app.tasks["add"].apply_async((1, 2), queue="other").get(timeout=LONG) == 3
    assert "ok" in told("cancel_consumer", queue="other")


def test_the_commands_status_and_inspect(place):
    for arguments in (["status"], ["inspect", "ping"]):
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "celery", "-A", "celery_app", *arguments],
            capture_output=True, text=True, env=environment(place), timeout=60, check=True,
        )  # fmt: skip
        assert "w1@test" in ran.stdout
        assert "1 node online" in ran.stdout


def test_revoked_tasks_do_not_run(app):
    result = app.tasks["add"].apply_async((1, 1), countdown=0.5)
    app.control.revoke(result.id)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=LONG)


def test_terminating_a_task(own, tmp_path):
    path = tmp_path / "runs"
    with working(tmp_path, "-P", "prefork", "-c", "1"):
        result = own.tasks["hold"].delay(str(path), LONG)
        until(path.exists, "the task")
        result.revoke(terminate=True, signal="SIGKILL")
        with pytest.raises(TaskRevokedError):
            result.get(timeout=LONG)
        assert own.tasks["add"].delay(1, 1).get(timeout=LONG) == 2


def test_events(app):
    seen, receivers = [], []

    def consume():
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": note})
            receivers.append(receiver)
            receiver.capture(limit=None, timeout=LONG, wakeup=True)

    def note(event):
        seen.append(event["type"])

    thread = threading.Thread(target=consume)
    thread.start()

    def came():
        app.tasks["add"].delay(1, 1).get(timeout=LONG)
        return {"task-sent", "task-received", "task-started", "task-succeeded"} <= set(seen)

    try:
        until(came, "the events")
    finally:
        receivers[0].should_stop = True
        thread.join(LONG)
    assert not thread.is_alive()


# --- deaths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_killed_worker_loses_no_task(own, tmp_path, pool):
    path = tmp_path / "runs"
    options = ("-P", pool, "-c", "2", "--prefetch-multiplier", "4")
    with working(tmp_path, *options, "-n", "first@test") as first:
        held = own.tasks["hold"].delay(str(path), LONG)
        until(path.exists, "the task")
        results = [own.tasks["hold"].delay(str(path), LONG) for _ in range(6)]
        kill(first)
    (tmp_path / "runs.end").write_text("")
    with working(tmp_path, *options, "-n", "second@test") as second:
        for result in [held, *results]:
            assert result.get(timeout=LONG) != first.pid
        assert second.poll() is None
        # A result is stored before its message is acknowledged: one that ends now gives it back.
        queue = own.backend._broker.store.queue("celery")
        until(lambda: queue.stats().unfinished == 0, "the acknowledgements")


def test_what_a_solo_worker_has_done_does_not_run_again(own, tmp_path):
    """Celery acknowledges in the next turn of its loop; its solo pool runs tasks in that loop."""
    path = tmp_path / "runs"
    for text in ("first", "second", "third", "last", "behind"):
        own.tasks["early"].delay(str(path), text)
    with working(tmp_path, "-P", "solo", "-n", "first@test") as first:
        until(lambda: path.exists() and "last" in path.read_text(), "the last task")
        kill(first)
    (tmp_path / "runs.end").write_text("")
    with working(tmp_path, "-P", "solo", "-n", "second@test"):
        until(lambda: len(path.read_text().split()) >= 6, "what was not acknowledged")
    ran = path.read_text().split()
    assert ran[:4] == ["first", "second", "third", "last"]
    assert sorted(ran[4:]) == ["behind", "last"]


def test_a_task_runs_when_it_is_due_although_a_worker_was_killed_meanwhile(own, tmp_path):
    """It is due in two hours. The clocks of the workers are set, all of them but the sender's."""
    machine, path = Machine(tmp_path), tmp_path / "runs"
    eta = datetime.now(UTC) + timedelta(hours=2)
    result = own.tasks["when"].apply_async((str(path),), eta=eta)
    queue = own.backend._broker.store.queue("celery")
    machine.set(passed=1.5 * HOUR)
    with working(tmp_path, "-c", "1", "-n", "first@test", **machine.variables()) as first:
        assert own.tasks["add"].delay(1, 1).get(timeout=LONG) == 2  # it looked at its queue
        until(lambda: queue.stats().leased == 0, "acknowledging")
        assert queue.stats().delayed == 1
        kill(first)
    assert not path.exists()
    machine.set(passed=eta.timestamp() - time.time() - 8)  # as long as it may take to start
    with working(tmp_path, "-c", "1", "-n", "second@test", **machine.variables()):
        result.get(timeout=LONG)
    (ran,) = map(float, path.read_text().split())
    assert 0 <= ran - eta.timestamp() < LONG


def test_a_long_task_runs_once(own, tmp_path):
    """No time-out makes it visible to another worker while its own is at work."""
    path = tmp_path / "runs"
    options = ("-P", "threads", "-c", "1")
    with working(tmp_path, *options, "-n", "a@test"), working(tmp_path, *options, "-n", "b@test"):
        result = own.tasks["hold"].delay(str(path), LONG)
        until(path.exists, "the task")
        assert own.backend._broker.store.queue("celery").stats().leased == 1
        (tmp_path / "runs.end").write_text("")
        result.get(timeout=LONG)
    assert len(path.read_text().splitlines()) == 1


def test_stopping_gives_back_what_was_prefetched(own, tmp_path):
    path = tmp_path / "runs"
    with working(tmp_path, "-P", "threads", "-c", "1", "--prefetch-multiplier", "8") as worker:
        own.tasks["hold"].delay(str(path), LONG)
        until(path.exists, "the task")
        for _ in range(5):
            own.tasks["note"].delay(str(path), "rest")
        queue = own.backend._broker.store.queue("celery")
        until(lambda: queue.stats().leased == 6, "prefetching")
        worker.send_signal(signal.SIGTERM)
        (tmp_path / "runs.end").write_text("")
        worker.wait(SOON)
    stats = queue.stats()
    assert stats.leased == 0
    assert stats.ready + len(path.read_text().splitlines()) == 6


# --- starting -------------------------------------------------------------------------------------


def test_it_works_after_the_installation_alone(tmp_path):
    """The application names millstream in two addresses, and nowhere else."""
    code = (
        "import os\n"
        "from celery import Celery\n"
        "app = Celery('plain', broker_url=os.environ['CELERY_URL'],"
        " result_backend=os.environ['CELERY_URL'])\n"
        "@app.task\n"
        "def twice(x):\n"
        "    return 2 * x\n"
    )
    (tmp_path / "plain.py").write_text(code)
    path = install(tmp_path / "installed")
    with working(tmp_path, "-P", "threads", "-c", "1", app="plain", PYTHONPATH=path):
        code = "import plain; print(plain.twice.delay(21).get(timeout=60))"
        ran = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, timeout=90, cwd=tmp_path, check=False,
            env=environment(tmp_path, PYTHONPATH=path),
        )  # fmt: skip
        assert ran.stdout == "42\n", ran.stderr


def test_a_wrong_path_is_said_at_start_up(tmp_path):
    (tmp_path / "file").write_text("")
    url = f"millstream://{tmp_path}/file/store"
    with working(tmp_path, "-P", "solo", ready=False, CELERY_URL=url) as worker:
        assert worker.wait(LONG) != 0
        assert "is there and is not a directory" in worker.log.read_text()


def test_a_queue_with_other_settings_is_said_at_start_up(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        store.queue("celery", priorities=2)
    with working(tmp_path, "-P", "solo", ready=False) as worker:
        assert worker.wait(LONG) != 0
        assert "has priorities 2, not 8" in worker.log.read_text()


@pytest.mark.parametrize("name", ["celery.results", "celery.chords"])
def test_results_of_others_are_said_at_start_up(tmp_path, name):
    with millstream.open(tmp_path / "store") as store:
        store.stream(name, partitions=3)
    with working(tmp_path, "-P", "solo", ready=False) as worker:
        assert worker.wait(LONG) != 0
        assert "has 3 partitions, not 1" in worker.log.read_text()


# --- results, without a worker --------------------------------------------------------------------


def test_results_expire(own, monkeypatch):
    own.backend.store_result("one", 1, "SUCCESS")
    assert own.AsyncResult("one").state == "SUCCESS"
    own.backend._cache.clear()
    later = SimpleNamespace(time=lambda: time.time() + 3601)
    monkeypatch.setattr("millstream.contrib.results.time", later)
    assert own.AsyncResult("one").state == "PENDING"


def test_a_success_is_not_overwritten_by_a_lost_worker(own):
    own.backend.store_result("one", 1, "STARTED")
    own.backend.store_result("one", 2, "SUCCESS")
    own.backend.store_result("one", ValueError("lost"), "FAILURE")
    assert own.AsyncResult("one").get(timeout=1) == 2


def test_a_pickled_backend_finds_its_store_again(own):
    own.backend.store_result("one", 1, "SUCCESS")
    own.set_current()
    again = pickle.loads(pickle.dumps(own.backend))
    assert again.get_state("one") == "SUCCESS"


def test_results_that_retention_removed_are_gone(own):
    results = own.backend._results
    for number in range(5):
        results.set(b"%d" % number, b"x")
    assert results.get(b"4") == b"x"
    stream = own.backend._broker.store.stream("celery.results")
    results._prune(stream.next_offset(0) - 1)
    assert list(results.at) == [b"4"]


def test_other_processes_and_threads_see_results(own, tmp_path):
    own.backend.store_result("one", {"a": [1]}, "SUCCESS")
    code = (
        "import celery_app\n"
        "print(celery_app.app.AsyncResult('one').get(timeout=10))\n"
        "celery_app.app.backend.store_result('two', 2, 'SUCCESS')\n"
    )
    found = []
    thread = threading.Thread(target=lambda: found.append(own.AsyncResult("two").get(timeout=LONG)))
    thread.start()
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=60, env=environment(tmp_path), check=False,
    )  # fmt: skip
    assert ran.stdout == "{'a': [1]}\n", ran.stderr
    thread.join(LONG)
    assert found == [2]


def test_a_part_of_a_chord_that_is_run_again_counts_once(own):
    backend = own.backend
    body = own.tasks["total"].s()
    backend.set_chord_size("g", 2)

    def part(task, place):
        request = SimpleNamespace(id=task, group="g", group_index=place, chord=body)
        backend.on_chord_part_return(request, "SUCCESS", 1)
        return len(backend._broker.store.queue("celery"))

    with own.connection_for_write() as connection:
        own.amqp.queues["celery"](connection.default_channel).declare()
    assert part("a", 0) == 0
    assert part("a", 0) == 0  # its worker was killed behind the first time
    assert part("b", 1) == 1
    assert part("b", 1) == 1  # the callback is sent, and that is known


def test_a_callback_of_a_chord_is_sent_although_its_worker_was_killed(own, monkeypatch):
    backend = own.backend
    body = own.tasks["total"].s()
    backend.set_chord_size("g", 1)
    request = SimpleNamespace(id="a", group="g", group_index=0, chord=body)
    with own.connection_for_write() as connection:
        own.amqp.queues["celery"](connection.default_channel).declare()
    with monkeypatch.context() as patched:

        def killed(*_):
            raise KeyboardInterrupt

        patched.setattr(backend, "_finish_chord", killed)
        with pytest.raises(KeyboardInterrupt):
            backend.on_chord_part_return(request, "SUCCESS", 1)
    assert len(backend._broker.store.queue("celery")) == 0
    backend.on_chord_part_return(request, "SUCCESS", 1)
    assert len(backend._broker.store.queue("celery")) == 1


def test_a_chord_goes_on_although_a_lost_process_had_succeeded(own, monkeypatch):
    """Celery acknowledges a message whose success is stored: by then it has to be in the chord.

    Its worker looks for the success of a child that it lost (5.6 and later). A kill between the
    two, or before the callback was sent, left a chord that nobody ended.
    """
    backend = own.backend
    body = own.tasks["total"].s()
    body.options["task_id"] = "callback"

    def killed(*arguments):
        raise SystemExit

    for group_id, at in (("g", "_finish_chord"), ("h", "on_chord_part_return")):
        backend.set_chord_size(group_id, 1)
        task = f"{group_id}1"
        request = SimpleNamespace(
            id=task, group=group_id, group_index=0, chord=body, ignore_result=False
        )
        with monkeypatch.context() as patched:
            patched.setattr(backend, at, killed)
            with pytest.raises(SystemExit):
                backend.mark_as_done(task, 1, request=request)
        assert backend.get_task_meta(task)["status"] == "PENDING", at
        backend.mark_as_done(task, 1, request=request)  # delivered again
        assert backend.get_task_meta(task)["status"] == "SUCCESS"
    assert own.backend._broker.queue("celery").stats().ready == 2  # both callbacks
