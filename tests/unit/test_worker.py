"""Workers: what becomes of messages, in threads and in processes, in good times and in bad."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import worker_jobs
from timing import SOON, until

import millstream
from millstream import _native
from millstream.worker import Counts, Worker

QUICK = millstream.RetryPolicy(max_attempts=2, backoff=0.0)
JOBS = Path(worker_jobs.__file__)


@pytest.fixture(autouse=True)
def nothing_is_renewed_afterwards():
    yield
    gc.collect()
    assert _native.heartbeat_count() == 0


@pytest.fixture
def queue(store):
    return store.queue("q", retry=QUICK)


def run(queue, function=None, **options):
    """Run a function, or what is registered, over all that is there."""
    if function is not None:
        queue.worker(**options)(function)
    return millstream.run(queue, until_empty=True)


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


# --- stopping -------------------------------------------------------------------------------------


def test_stop_waits_for_what_runs(queue):
    queue.put_many([b"1", b"2"])
    begun, seen = threading.Event(), []

    def work(message):
        begun.set()
        until(lambda: worker._running and worker._running._loops[0].stopping.is_set())
        seen.append(message.value)

    worker = Worker(queue, work)
    worker.start()
    assert begun.wait(30)
    assert worker.stop(grace=30) == Counts(done=1)
    assert seen == [b"1"]
    assert not worker.alive
    assert [message.value for message in queue.get_many(5, timeout=0)] == [b"2"]


def test_stop_gives_back_after_the_grace_what_still_runs(queue):
    queue.put(b"x")
    begun, free = threading.Event(), threading.Event()

    def work(message):
        begun.set()
        free.wait(30)

    worker = Worker(queue, work)
    worker.start()
    assert begun.wait(30)
    running = worker._running
    assert worker.stop(grace=0.05) == Counts(released=1)
    with queue.get(timeout=60) as message:
        assert message.attempt == 1
        free.set()  # the old call goes on, and what it does comes to nothing
        until(lambda: not running.alive)
        assert not message.lost
    assert len(queue) == 0


def test_worker_starts_again_after_a_stop(queue):
    seen = []
    worker = Worker(queue, lambda message: seen.append(message.value))
    for value in (b"1", b"2"):
        queue.put(value)
        with worker:
            until(lambda value=value: value in seen)
    assert worker.counts == Counts(done=2)
    assert worker.stop() == Counts(done=2)


def test_closed_store_ends_the_workers_with_an_error():
    store = millstream.temporary(durability="process")
    queue = store.queue("q")
    worker = Worker(queue, print)
    worker.start()
    store.close()
    until(lambda: not worker.alive)
    assert isinstance(worker.error, millstream.Closed)
    worker.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_what_runs_and_keeps_the_rest(tmp_path, number):
    path, ready = str(tmp_path / "store"), tmp_path / "ready"
    with millstream.open(path) as store:
        queue = store.queue("q")
        queue.put_many([b"0.5", b"60", b"0", b"0"])
        process = subprocess.Popen(
            [sys.executable, str(JOBS), path, str(ready)], stdout=subprocess.PIPE, text=True
        )
        until(ready.exists)
        until(lambda: queue.stats().leased == 2)
        process.send_signal(number)
        out, _ = process.communicate(timeout=600)
        assert out == "1 done, 0 failed, 1 released\n"
        assert process.returncode == 0
        assert sorted(m.value for m in queue.get_many(10, timeout=0)) == [b"0", b"0", b"60"]


def test_signal_handlers_are_restored(queue):
    queue.put(b"x")
    before = signal.getsignal(signal.SIGTERM)
    run(queue, lambda message: None)
    assert signal.getsignal(signal.SIGTERM) is before


# --- processes ------------------------------------------------------------------------------------


def put_jobs(queue, tmp_path, count):
    where = {"to": str(tmp_path).encode()}
    return queue.put_many([millstream.Put(b"job", headers=where) for _ in range(count)])


def notes(tmp_path):
    """(message, process) of every note."""
    return [tuple(map(int, path.name.split("-"))) for path in tmp_path.iterdir()]


def test_processes_share_the_work(queue, tmp_path):
    ids = put_jobs(queue, tmp_path, 200)
    with Worker(queue, worker_jobs.note, concurrency=2, mode="process") as worker:
        until(lambda: len(worker.pids) == 2)
        queue.join(timeout=60)
    assert worker.stop() == Counts(done=200)
    found = notes(tmp_path)
    assert sorted(message for message, _ in found) == sorted(ids)
    assert os.getpid() not in {process for _, process in found}


def test_processes_take_batches(queue, tmp_path):
    put_jobs(queue, tmp_path, 20)
    queue.put(b"bad")
    with Worker(queue, worker_jobs.note_all, mode="process", batch=10) as worker:
        queue.join(timeout=60)
    assert worker.stop() == Counts(done=20, failed=2, dead=1)


def test_killed_process_is_replaced_and_its_message_comes_again(queue, tmp_path):
    (message,) = put_jobs(queue, tmp_path, 1)
    with Worker(queue, worker_jobs.die_once, mode="process") as worker:
        queue.join(timeout=60)
    assert worker.stop().done == 1
    (first, one), (second, two) = notes(tmp_path)
    assert first == second == message
    assert one != two


def test_process_gives_back_after_the_grace_what_still_runs(queue, tmp_path):
    put_jobs(queue, tmp_path, 1)
    worker = Worker(queue, worker_jobs.slowly, mode="process")
    worker.start()
    until(lambda: notes(tmp_path))
    start = time.monotonic()
    assert worker.stop(grace=0.1) == Counts(released=1)
    assert time.monotonic() - start < SOON  # of the minutes that it would take
    with queue.get(timeout=60) as message:
        assert message.attempt == 1


def test_process_is_ended_after_the_time_limit(store, tmp_path):
    queue = store.queue("q", retry=millstream.RetryPolicy(max_attempts=1))
    put_jobs(queue, tmp_path, 1)
    with Worker(queue, worker_jobs.slowly, mode="process", time_limit=0.3):
        until(lambda: queue.dead.list())
    (dead,) = queue.dead.list()
    assert "longer than 0.3 s" in dead.last_error


def test_rejected_in_a_process_is_dead(queue, tmp_path):
    put_jobs(queue, tmp_path, 1)
    with Worker(queue, worker_jobs.refuse, mode="process") as worker:
        queue.join(timeout=60)
    assert worker.stop() == Counts(failed=1, dead=1)


def test_function_that_exits_its_process_is_tried_as_often_as_others(queue, tmp_path):
    put_jobs(queue, tmp_path, 1)
    with Worker(queue, worker_jobs.leave, mode="process") as worker:
        queue.join(timeout=60)
    assert worker.stop() == Counts(failed=2, dead=1)
    assert len(notes(tmp_path)) == 2
    (dead,) = queue.dead.list()
    assert dead.last_error == "SystemExit(3)"


def test_processes_end_when_their_parent_is_killed(tmp_path):
    code = f"""
import os, sys, threading
sys.path.insert(0, {str(JOBS.parent)!r})
import millstream, worker_jobs
from millstream.worker import Worker
if __name__ == "__main__":
    store = millstream.open(sys.argv[1])
    worker = Worker(store.queue("q"), worker_jobs.note, mode="process")
    worker.start()
    while not worker.pids:
        os.sched_yield()
    print(worker.pids[0], flush=True)
    threading.Event().wait()  # to be killed
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()

    def is_gone():
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    until(is_gone)


START = """
import sys, threading
sys.path.insert(0, {jobs!r})
import millstream, worker_jobs
from millstream.worker import Worker
"""


def run_script(tmp_path, body, name="script.py"):
    """Run a program that has a store with one message in a queue; what it printed."""
    script = tmp_path / name
    script.write_text(START.format(jobs=str(JOBS.parent)) + body)
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done.stdout, done.stderr


class NoPickle:
    """A codec that cannot be sent to another process."""

    encode = staticmethod(bytes)
    decode = staticmethod(bytes)

    def __init__(self):
        self.lock = threading.Lock()


@pytest.mark.parametrize("how", ["run", "start", "with"])
def test_codec_that_does_not_pickle_is_said_at_once(store, how):
    queue = store.queue("q", codec=NoPickle())
    queue.put(b"x")
    worker = Worker(queue, worker_jobs.note, mode="process")
    queue.worker(mode="process")(worker_jobs.note)
    with pytest.raises(millstream.WorkerError, match=r"pickle.*TypeError.*lock") as caught:
        if how == "run":
            millstream.run(queue, until_empty=True)
        elif how == "start":
            worker.start()
        else:
            with worker:
                queue.join(timeout=60)
    assert caught.value.kind == "TypeError"
    assert isinstance(caught.value.__cause__, TypeError)
    assert len(queue) == 1
    assert not worker.alive


@pytest.mark.parametrize("how", ["run", "start", "with"])
def test_module_that_children_cannot_import_is_raised_with_their_traceback(
    queue, tmp_path, monkeypatch, how
):
    """Their interpreter finds another module of that name than ours."""
    (tmp_path / "gone_jobs.py").write_text("def work(message): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import gone_jobs

    (tmp_path / "gone_jobs.py").write_text("import nothing_of_this_name\n")
    queue.put(b"x")
    queue.worker(mode="process", concurrency=2)(gone_jobs.work)
    worker = Worker(queue, gone_jobs.work, mode="process", concurrency=2)
    with pytest.raises(millstream.WorkerError, match="nothing_of_this_name") as caught:
        if how == "run":
            millstream.run(queue)
        elif how == "start":
            worker.start()
        else:
            with worker:
                queue.join(timeout=60)
    error = caught.value
    assert error.kind == "ModuleNotFoundError"
    assert "Traceback" in error.traceback and "gone_jobs.py" in error.traceback
    assert error.traceback in error.__notes__[0]
    assert not worker.alive
    with queue.get(timeout=5) as message:
        assert message.attempt == 1  # nobody had it


def test_children_that_die_without_a_word_are_told_by_their_exit_code(queue, tmp_path, monkeypatch):
    (tmp_path / "dead_jobs.py").write_text("def work(message): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import dead_jobs

    (tmp_path / "dead_jobs.py").write_text("import os; os._exit(41)\n")
    with pytest.raises(millstream.WorkerError, match="exit code 41") as caught:
        Worker(queue, dead_jobs.work, mode="process").start()
    assert (caught.value.kind, caught.value.traceback) == ("", "")


def test_missing_guard_of_the_main_module_is_said(tmp_path):
    body = """
queue = millstream.open(sys.argv[1]).queue("q")
queue.put(b"x")
queue.worker(mode="process")(worker_jobs.note)
try:
    millstream.run(queue, until_empty=True)
except millstream.WorkerError as error:
    print(error.kind, error)
    if "__mp_main__" in sys.modules:
        raise
"""
    out, _ = run_script(tmp_path, body)
    assert out.splitlines()[-1].startswith("WorkerError ")
    assert 'if __name__ == "__main__"' in out.splitlines()[-1]


def test_daemonic_process_is_told_that_it_may_have_no_children(tmp_path):
    body = """
import multiprocessing
def work(path):
    queue = millstream.open(path).queue("q")
    queue.put(b"x")
    queue.worker(mode="process")(worker_jobs.note)
    try:
        millstream.run(queue, until_empty=True)
    except millstream.WorkerError as error:
        print(error, flush=True)
if __name__ == "__main__":
    process = multiprocessing.Process(target=work, args=(sys.argv[1],), daemon=True)
    process.start()
    process.join()
"""
    out, _ = run_script(tmp_path, body)
    assert "daemonic" in out and 'mode="thread"' in out


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_start_method_of_the_program_does_not_matter(tmp_path, method):
    body = """
import multiprocessing
def work(message):
    import os
    assert os.getppid() > 1
if __name__ == "__main__":
    multiprocessing.set_start_method("METHOD")
    with millstream.open(sys.argv[1]) as store:
        queue = store.queue("q")
        queue.put(b"x")
        queue.worker(mode="process")(work)
        print(millstream.run(queue, until_empty=True))
""".replace("METHOD", method)
    out, err = run_script(tmp_path, body)
    assert out == "1 done, 0 failed, 0 released\n", err


def test_function_of_a_program_without_a_file_is_said(tmp_path):
    body = (
        START.format(jobs=str(JOBS.parent))
        + """
def work(message): pass
with millstream.open(sys.argv[1]) as store:
    try:
        Worker(store.queue("q"), work, mode="process").start()
    except millstream.WorkerError as error:
        print(error.kind, error)
"""
    )
    command = [sys.executable, "-c", body, str(tmp_path / "store")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
    assert out.startswith("AttributeError ") and "'work'" in out


def test_no_process_to_be_had_is_raised(queue, monkeypatch):
    def refuse(*args, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(millstream.WorkerError, match="temporarily unavailable"):
        Worker(queue, worker_jobs.note, mode="process").start()


def test_children_that_cannot_be_replaced_end_the_worker(queue, tmp_path, monkeypatch):
    put_jobs(queue, tmp_path, 1)
    worker = Worker(queue, worker_jobs.die_once, mode="process")
    worker.start()
    (process,) = worker.pids

    def refuse(*args, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    until(lambda: not worker.alive)  # it died over its message, and no other can be made
    with pytest.raises(millstream.WorkerError):
        worker.stop()
    assert notes(tmp_path) == [(notes(tmp_path)[0][0], process)]
    with queue.get(timeout=30) as message:
        assert message.attempt == 2


def test_signal_while_children_start_ends_the_run(queue, tmp_path, monkeypatch):
    """A child whose imports never end must not keep SIGTERM from being heard."""
    (tmp_path / "slow_jobs.py").write_text("def work(message): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import slow_jobs

    (tmp_path / "slow_jobs.py").write_text(
        f"import signal; open({str(tmp_path / 'here')!r}, 'w').close()\n"
        "while True: signal.pause()\n"  # until it is killed
    )
    queue.worker(mode="process")(slow_jobs.work)

    def interrupt():
        until((tmp_path / "here").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert millstream.run(queue, grace=0) == Counts()
    thread.join()


@pytest.mark.parametrize("how", ["run", "start"])
def test_children_that_hang_while_they_start_are_named(queue, tmp_path, monkeypatch, caplog, how):
    name = f"stuck_jobs_{how}"
    module = tmp_path / f"{name}.py"
    module.write_text("def work(message): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("millstream.queues.worker.NOTICE_SECONDS", (0.05, 0.1))
    function = __import__(name).work
    module.write_text("import signal\nwhile True: signal.pause()\n")  # until it is killed
    queue.put(b"x")
    queue.worker(mode="process")(function)
    worker = queue._workers[0] if how == "run" else Worker(queue, function, mode="process")
    said, named = [], "q: worker process "  # the notice of `run` may come first, and names it too

    def interrupt():
        try:
            until(lambda: any(one.startswith(named) for one in caplog.messages))
            said.append((worker.pids, worker.waits_for))
            if how == "run":
                until(lambda: any("until_empty=True) waits" in one for one in caplog.messages))
        finally:
            os.kill(os.getpid(), signal.SIGTERM) if how == "run" else worker.stop(0)

    thread = threading.Thread(target=interrupt)
    thread.start()
    if how == "run":
        assert millstream.run(queue, grace=0, until_empty=True) == Counts()
    else:
        worker.start()
    thread.join()
    ((pid,), waits_for), *_ = said
    notice = next(one for one in caplog.messages if one.startswith(named))
    assert notice.startswith(f"{named}{pid} has not begun to take messages for ")
    assert waits_for.startswith("1 not finished: 1 ready; of its worker processes ")
    assert waits_for.endswith(f"has not begun to take messages: {pid}")
    if how == "run":
        assert any("until_empty=True) waits" in m and waits_for in m for m in caplog.messages)


# --- one run among others -------------------------------------------------------------------------


@contextlib.contextmanager
def signal_after(seconds, handler):
    """Have SIGALRM come once, for a handler of its own."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_run_goes_on_after_a_handler_that_outlasts_its_waits(tmp_path):
    """SimpleQueue.get of CPython 3.11 waits for ever once a handler has outlasted its time-out."""
    body = """
import select, signal
with millstream.open(sys.argv[1]) as store:
    queue = store.queue("q")
    queue.put(b"later", delay=0.6)
    queue.worker()(lambda message: None)
    calls = []
    def handler(*_):
        calls.append(1)
        select.select([], [], [], 0.15)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.2)
    counts = millstream.run(queue, until_empty=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(counts, bool(calls))
"""
    out, err = run_script(tmp_path, body)
    assert out == "1 done, 0 failed, 0 released True\n", err


def test_second_signal_ends_the_grace_at_once(queue):
    begun, free = threading.Event(), threading.Event()
    queue.put(b"x")

    def work(message):
        begun.set()
        free.wait(60)

    def interrupt():
        begun.wait(60)
        (loop,) = queue._workers[0]._running._loops
        os.kill(os.getpid(), signal.SIGTERM)
        until(loop.stopping.is_set)  # two signals at once are one
        os.kill(os.getpid(), signal.SIGTERM)

    queue.worker()(work)
    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    counts = millstream.run(queue, grace=60)
    thread.join()
    free.set()
    assert counts == Counts(released=1)
    assert time.monotonic() - began < 30


def test_run_in_a_handler_of_a_run_leaves_its_workers_alone(queue):
    done, raised = [], []

    def handler(*_):
        try:
            millstream.run(queue, until_empty=True)
        except millstream.Reentered as error:
            raised.append(error)

    def other():
        until(lambda: raised)
        queue.put(b"after")
        until(lambda: done)
        os.kill(os.getpid(), signal.SIGTERM)

    queue.worker()(lambda message: done.append(message.value))
    thread = threading.Thread(target=other)
    thread.start()
    with signal_after(0.2, handler):
        assert millstream.run(queue) == Counts(done=1)
    thread.join()
    assert done == [b"after"]
    assert "q: its workers run already" in str(raised[0])


def test_run_in_another_thread_is_refused_and_ends_nothing(queue):
    done, ended = [], []
    queue.worker()(lambda message: done.append(message.value))
    thread = threading.Thread(target=lambda: ended.append(millstream.run(queue, until_empty=True)))
    queue.put(b"late", delay=1.0)  # keeps the first one
    thread.start()
    until(lambda: queue._workers[0].alive)
    with pytest.raises(millstream.InvalidArgument, match="its workers run already"):
        millstream.run(queue, until_empty=True)
    assert queue._workers[0].alive
    thread.join()
    assert (done, ended) == ([b"late"], [Counts(done=1)])
    queue.put(b"again")
    assert millstream.run(queue, until_empty=True) == Counts(done=1)


def test_refused_run_ends_what_it_had_begun_of_other_queues(store, queue):
    free = store.queue("free")
    for one in (free, queue):
        one.worker()(lambda message: None)
    queue.put(b"late", delay=1.0)
    thread = threading.Thread(target=millstream.run, args=(queue,), kwargs={"until_empty": True})
    thread.start()
    until(lambda: queue._workers[0].alive)
    with pytest.raises(millstream.InvalidArgument, match="q: its workers run already"):
        millstream.run(free, queue)
    assert not free._workers[0].alive
    thread.join()


def test_queue_that_is_named_twice_is_counted_once(queue):
    queue.put(b"x")
    queue.worker()(lambda message: None)
    assert millstream.run(queue, queue, until_empty=True) == Counts(done=1)


def test_run_whose_workers_are_stopped_by_others_says_so(queue):
    queue.put(b"later", delay=3600)
    queue.worker()(lambda message: None)
    (worker,) = queue._workers

    def stop():
        until(lambda: worker.alive)
        worker.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(millstream.WorkerError, match="q: its workers were stopped"):
        millstream.run(queue, until_empty=True)
    thread.join()


def test_signal_that_comes_in_a_run_of_a_handler_ends_the_run_under_it_too(store, queue):
    other = store.queue("other")
    for one in (queue, other):
        one.worker()(lambda message: None)
    inner = []

    def handler(*_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        inner.append(millstream.run(other))

    with signal_after(0.2, handler):
        assert millstream.run(queue) == Counts()
    assert inner == [Counts()]


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


def test_function_that_no_process_can_import_is_refused(queue):
    def local(message):
        pass

    for function in (local, lambda message: None):
        with pytest.raises(millstream.InvalidArgument, match="by name"):
            Worker(queue, function, mode="process")


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


def test_stop_in_the_middle_of_a_sync_says_so(tmp_path, monkeypatch):
    """As from a signal handler: the worker's thread waits for the sync word of this very thread."""
    with millstream.open(tmp_path / "store", durability="sync") as store:
        queue = store.queue("q")
        sync = queue._sync_now
        stopped = []

        def interrupted():
            if not stopped:
                stopped.append(None)
                worker = Worker(queue, lambda message: None)
                worker.start()
                with pytest.raises(millstream.errors.Reentered):
                    worker.stop()
                stopped.append(worker)
            sync()

        monkeypatch.setattr(queue, "_sync_now", interrupted)
        queue.put(b"x")
        stopped[1].stop()
        assert not stopped[1].alive


# --- in the middle of a call of the same thread, as from a signal handler -------------------------


def test_threads_start_in_the_middle_of_a_call_and_wait_for_its_end(store):
    queue = store.queue("q")
    queue.put(b"1")
    seen = []
    worker = Worker(queue, lambda message: seen.append(store.stream("made")))
    with store._lock:
        worker.start()
        until(lambda: worker.held)
        with pytest.raises(millstream.Reentered):  # its function waits for this thread
            worker.stop()
        assert worker.alive
    until(lambda: seen)
    assert worker.stop() == Counts(done=1)


def test_run_in_the_middle_of_a_call_it_waits_for_says_so(store):
    queue = store.queue("q")
    queue.put(b"1")
    queue.worker()(lambda message: store.stream("made"))
    with store._lock, pytest.raises(millstream.Reentered):
        millstream.run(queue, until_empty=True)
    assert millstream.run(queue, until_empty=True).done <= 1  # the first may have finished it
    assert len(queue) == 0


def test_run_in_the_middle_of_a_call_it_does_not_wait_for_works(store, tmp_path):
    queue = store.queue("q")
    queue.put(b"1")
    queue.worker()(lambda message: None)
    with millstream.open(tmp_path / "other") as other, other._lock:
        assert millstream.run(queue, until_empty=True) == Counts(done=1)


def test_processes_are_not_started_in_the_middle_of_a_call(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        queue = store.queue("q")
        worker = Worker(queue, worker_jobs.note, mode="process")
        queue.worker(mode="process")(worker_jobs.note)
        with store._lock:
            for call in (worker.start, lambda: millstream.run(queue, until_empty=True)):
                with pytest.raises(millstream.Reentered, match="store"):
                    call()
        assert not worker.alive
        worker.stop()


def test_processes_that_do_not_end_in_the_middle_of_a_call_say_so(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        queue = store.queue("q")
        queue.put(b"1", headers={"to": os.fsencode(tmp_path)})
        worker = Worker(queue, worker_jobs.slowly, mode="process")
        worker.start()
        until(lambda: worker.held)
        begun = time.monotonic()
        with store._lock, pytest.raises(millstream.Reentered, match="Stop them again"):
            worker.stop(grace=600)
        assert time.monotonic() - begun < SOON
        worker.stop(grace=0)
        assert not worker.alive


@pytest.mark.parametrize("call", ["start", "stop", "counts"])
def test_handlers_call_a_worker_at_lines_of_its_own_calls(store, call):
    """Calls of a worker in the middle of calls of the same one, in its main thread."""
    queue = store.queue("q")
    package = os.path.dirname(millstream.__file__)
    at, count = 0, 1
    while at < count:
        at += 1 + count // 12
        worker = Worker(queue, lambda message: None)
        count = 0

        def trace(frame, event, _, worker=worker, at=at):
            nonlocal count
            if not frame.f_code.co_filename.startswith(package):
                return None
            if event == "line":
                count += 1
                if count == at:
                    sys.settrace(None)
                    with contextlib.suppress(millstream.Reentered):
                        found = getattr(worker, call)
                        _ = found() if callable(found) else found
                    sys.settrace(trace)
            return trace

        begun = time.monotonic()
        sys.settrace(trace)
        try:
            worker.start()
            worker.stop(grace=5)
        finally:
            sys.settrace(None)
        worker.stop(grace=5)
        assert time.monotonic() - begun < SOON
        assert not worker.alive


def test_a_forked_child_starts_a_worker_of_its_own(tmp_path):
    """What it inherited does not run in it, and a closed queue is said to be closed."""
    with millstream.open(tmp_path / "s") as store:
        worker = Worker(store.queue("q"), lambda message: None)
        with worker:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    assert not worker.alive
                    assert not worker.pids
                    try:
                        worker.start()
                    except millstream.Closed:
                        status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0


def test_a_worker_of_a_closed_queue_does_not_start(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        worker = Worker(store.queue("q"), lambda message: None)
    with pytest.raises(millstream.Closed):
        worker.start()
