"""Worker processes: they share the work, are replaced, and what keeps one from starting is said."""

import contextlib
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
from worker_steps import JOBS, START, put_jobs, run_script

import millstream
from millstream.worker import Counts, Worker

pytestmark = pytest.mark.usefixtures("nothing_is_renewed")


# --- processes ------------------------------------------------------------------------------------


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
    monkeypatch.setattr("millstream.queues.worker_processes.NOTICE_SECONDS", (0.05, 0.1))
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


# --- bad input ------------------------------------------------------------------------------------


def test_function_that_no_process_can_import_is_refused(queue):
    def local(message):
        pass

    for function in (local, lambda message: None):
        with pytest.raises(millstream.InvalidArgument, match="by name"):
            Worker(queue, function, mode="process")


# --- in the middle of a call of the same thread, as from a signal handler -------------------------


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
