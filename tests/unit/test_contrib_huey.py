"""`contrib.huey` under huey's own tests, and where it promises more than huey's storages."""

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import millstream

pytest.importorskip("huey")

from huey.constants import EmptyData

from millstream import contrib
from millstream.contrib.huey import MillstreamHuey, MillstreamStorage

HERE = Path(__file__).parent


@pytest.fixture
def make(tmp_path):
    """A function that makes hueys of one store, as its processes do."""
    made = []

    def make(name="app", **options):
        options = {"path": tmp_path / "store", "durability": "process", **options}
        made.append(MillstreamHuey(name, read_timeout=0.01, **options))
        return made[-1]

    yield make
    for huey in made:
        huey.storage.close()


@pytest.fixture
def huey(make):
    return make()


@pytest.mark.slow
def test_its_own_suite_passes_with_our_storage():
    env = {**os.environ, "HUEY_SLOW_TESTS": "1"}
    command = [sys.executable, "-W", "error", HERE / "huey_suite.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(f"huey's tests: {counts['ran']} run, {counts['of_storage']} of them StorageTests")
    assert counts["bad"] == [], done.stderr
    assert counts["skipped"] == []
    assert counts["ran"] >= 200
    assert counts["of_storage"] == 10


# --- what is worth more than huey's own storages --------------------------------------------------


def test_a_task_is_off_the_queue_when_it_has_ended(huey):
    seen = []

    @huey.task()
    def look():
        seen.append(huey.storage._open().lanes.queues[0].stats().leased)

    look()
    task = huey.dequeue()
    assert len(huey) == 0
    huey.execute(task)
    assert seen == [1]
    assert huey.storage._open().lanes.queues[0].stats().unfinished == 0


def test_a_task_that_fails_is_off_the_queue_and_tried_as_huey_says(huey):
    @huey.task(retries=1)
    def fail():
        raise ValueError("no")

    result = fail()
    for left in (1, 0):
        huey.execute(huey.dequeue())
        assert len(huey) == left
    with pytest.raises(Exception, match="no"):
        result()


def run(program, path, *words):
    """A program that has a huey in `path`, with a task `wait` that says that it runs."""
    head = """
        import signal, sys
        from millstream.contrib.huey import MillstreamHuey

        huey = MillstreamHuey("app", path=sys.argv[1], durability="process")

        @huey.task(name="wait")
        def wait(*_):
            print("runs", flush=True)
            signal.pause()
    """
    code = textwrap.dedent(head) + textwrap.dedent(program)
    command = [sys.executable, "-c", code, path, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def named_as_there(huey, function):
    """The task `wait` of the program above, which does something else in this process."""

    def wait(*arguments):
        return function(*arguments)

    wait.__module__ = "__main__"
    return huey.task()(wait)


CONSUMER = "huey.create_consumer(workers=1, periodic=False, worker_type=sys.argv[2]).run()"


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_task_of_a_killed_worker_comes_back(make, tmp_path, kind):
    huey = make()
    ran = []
    named_as_there(huey, ran.append)(7)
    with run(CONSUMER, tmp_path / "store", kind) as consumer:
        assert consumer.stdout.readline() == "runs\n"
        assert huey.dequeue() is None
        children = subprocess.run(
            ["pgrep", "-P", str(consumer.pid)], capture_output=True, text=True
        ).stdout.split()
        consumer.kill()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        consumer.wait()
    huey.storage.read_timeout = 60
    huey.execute(huey.dequeue())
    assert ran == [7]
    assert huey.storage.queue_size() == 0


def test_an_interrupted_task_comes_back(make, tmp_path):
    huey = make()
    named_as_there(huey, print)()
    with run(CONSUMER, tmp_path / "store", "process") as consumer:
        assert consumer.stdout.readline() == "runs\n"
        consumer.terminate()
        consumer.wait(60)
    huey.storage.read_timeout = 60
    assert huey.dequeue().name == "wait"


def test_a_close_ends_the_wait_for_a_task(huey):
    huey.storage.read_timeout = 60
    found = []
    worker = threading.Thread(target=lambda: found.append(huey.dequeue()))
    worker.start()
    huey.storage.close()
    worker.join(30)
    assert found == [None]
    huey.storage.enqueue(b"x")
    assert huey.storage.dequeue() == b"x"


def test_the_lease_of_a_long_task_is_renewed(make):
    huey = make(lease=0.3)
    entered, leave = threading.Event(), threading.Event()

    @huey.task()
    def long():
        entered.set()
        assert leave.wait(60)
        return "done"

    result = long()
    worker = threading.Thread(target=lambda: huey.execute(huey.dequeue()))
    worker.start()
    assert entered.wait(60)
    huey.storage.read_timeout = 1.0  # three leases
    assert huey.dequeue() is None
    leave.set()
    worker.join()
    assert result() == "done"
    assert huey.storage._open().lanes.queues[0].stats().unfinished == 0


def test_what_no_worker_can_read_is_a_dead_letter(huey):
    huey.storage.enqueue(b"not a task")
    with pytest.raises(Exception, match="invalid load key"):
        huey.dequeue()
    (letter,) = huey.storage._open().lanes.queues[0].dead.list()
    assert letter.value == b"not a task"
    assert "invalid load key" in letter.last_error


def test_a_task_whose_outcome_cannot_be_kept_is_tried_again(huey, monkeypatch):
    @huey.task()
    def one():
        return 1

    result = one()
    with monkeypatch.context() as patch:
        patch.setattr(MillstreamStorage, "put_data", refuse)
        with pytest.raises(millstream.StoreFull):
            huey.execute(huey.dequeue())
    huey.storage.read_timeout = 60
    huey.execute(huey.dequeue())
    assert result() == 1


def test_a_task_whose_outcome_can_never_be_kept_is_a_dead_letter(huey):
    @huey.task(priority=0.5)
    def then(_):
        pass

    task = huey.task(name="one")(lambda: 1)
    huey.enqueue(task.s().then(then))
    with pytest.raises(millstream.InvalidArgument):
        huey.execute(huey.dequeue())
    stats = huey.storage._open().lanes.queues[0].stats()
    assert (stats.unfinished, stats.dead) == (0, 1)


def refuse(*_, **__):
    raise millstream.StoreFull(28, "no room")


def test_what_is_claimed_off_the_schedule_by_a_killed_process_comes_back(make, monkeypatch):
    mine, other = make(), make()
    task = mine.task(name="one")(print)
    other.task(name="one")(print)
    task.schedule(eta=datetime(2000, 1, 1))
    mine.execute(mine.dequeue(), timestamp=datetime(1999, 1, 1))  # to the schedule
    assert len(mine.read_schedule()) == 1  # and then it is killed
    assert (other.scheduled_count(), other.read_schedule()) == (0, [])
    later = time.time() + 61
    monkeypatch.setattr("millstream.contrib.huey.time.time", lambda: later)
    (again,) = other.read_schedule()
    other.enqueue(again)
    assert (len(other), other.scheduled_count()) == (1, 0)


def test_priorities_of_any_whole_number_are_in_order(make):
    huey, other = make(), make()
    given = [0, 100, -1, 8, 7, None, -20, 9]
    for number in given:
        huey.storage.enqueue(str(number).encode(), number)
    expected = [b"100", b"9", b"8", b"7", b"0", b"None", b"-1", b"-20"]
    assert other.storage.enqueued_items() == expected
    assert other.storage.enqueued_items(3) == expected[:3]
    assert other.storage.queue_size() == len(given)
    assert [other.storage.dequeue() for _ in given] == expected


def test_a_priority_between_two_is_refused(huey):
    with pytest.raises(millstream.InvalidArgument, match=r"2\.5: millstream has whole numbers"):
        huey.storage.enqueue(b"x", 2.5)


def test_priorities_have_a_limit(huey):
    with pytest.raises(millstream.LimitExceeded, match="use fewer"):
        for number in range(0, 8 * 50, 8):
            huey.storage.enqueue(b"x", number)


def test_a_full_queue_refuses(make, monkeypatch):
    monkeypatch.setattr("millstream.contrib.huey.PUT_SECONDS", 0.01)
    huey = make(capacity=2)
    huey.storage.enqueue(b"1")
    huey.storage.enqueue(b"2")
    with pytest.raises(millstream.QueueFull):
        huey.storage.enqueue(b"3")


# --- between processes ----------------------------------------------------------------------------

RACE = """
    storage = huey.storage
    print(sum(storage.put_if_empty(f"key {n}", b"mine") for n in range(300)), flush=True)
    for _ in range(300):
        storage.incr("all")
    print(sum(storage.pop_data(f"key {n}") == b"mine" for n in range(300)), flush=True)
"""


def test_locks_counters_and_results_are_atomic_between_processes(make, tmp_path):
    huey = make()
    racers = [run(RACE, tmp_path / "store") for _ in range(4)]
    printed = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    won = sum(int(lines[0]) for lines in printed)
    popped = sum(int(lines[1]) for lines in printed)
    assert won >= 300  # where one has popped a key, another may put it again
    assert won == popped + huey.result_count()
    assert huey.storage.incr("all", 0) == 1200


def test_each_key_has_one_winner(make, tmp_path):
    program = """
        print(*(n for n in range(300) if huey.storage.put_if_empty(f"key {n}", b"")))
    """
    racers = [run(program, tmp_path / "store") for _ in range(4)]
    won = [int(n) for racer in racers for n in racer.communicate(timeout=60)[0].split()]
    assert sorted(won) == list(range(300))


def test_a_result_wakes_who_waits_in_another_process(make, tmp_path):
    huey = make()
    program = "print('waits', flush=True); print(huey.storage.wait_result('r', max_delay=60))"
    with run(program, tmp_path / "store") as waiter:
        assert waiter.stdout.readline() == "waits\n"
        huey.storage.put_data("r", b"x")
        assert waiter.communicate(timeout=30)[0] == "True\n"


def test_a_forked_process_opens_the_store_again(huey):
    huey.storage.put_data("a", b"1")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            huey.storage.enqueue(b"of the child")
            huey.storage.put_data("b", huey.storage.pop_data("a") + b"2")
            huey.storage.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert huey.storage.dequeue() == b"of the child"
    assert huey.storage.result_items() == {"b": b"12"}


def test_rows_outlive_the_process_compaction_and_a_long_pause(make, monkeypatch):
    huey = make()
    for number in range(100):
        huey.storage.put_data(f"{number}", b"x" * 100)
    for number in range(99):
        huey.storage.pop_data(f"{number}")
    huey.storage.incr("count", 5)
    stream = huey.storage._open().table._stream
    stream.compact()
    huey.storage.close()
    assert huey.storage.result_items() == {"99": b"x" * 100}
    assert huey.storage.incr("count", 0) == 5
    monkeypatch.setattr("millstream.contrib.huey.STALE_SECONDS", -1.0)  # each call reads anew
    assert huey.storage.peek_data("99") == b"x" * 100
    assert huey.storage.peek_data("98") is EmptyData
    assert huey.storage.put_if_empty("98", b"")
    assert not huey.storage.put_if_empty("98", b"")


def test_an_eta_is_met_within_its_second_in_local_time_and_utc(make):
    for utc in (True, False):
        huey = make(f"utc-{utc}", utc=utc)
        task = huey.task(name="one")(print)
        task.schedule(delay=3600)
        huey.execute(huey.dequeue())
        now = huey._get_timestamp()
        assert huey.read_schedule(now + timedelta(seconds=3599)) == []
        assert len(huey.read_schedule(now + timedelta(seconds=3601))) == 1


# --- what is refused at start-up ------------------------------------------------------------------


def test_no_path_is_refused_but_in_immediate_mode():
    with pytest.raises(millstream.InvalidArgument, match="say path="):
        MillstreamHuey("app")
    huey = MillstreamHuey("app", immediate=True)
    assert huey.task()(lambda: 5)()() == 5


def test_a_path_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(millstream.StorageError, match="is not a directory"):
        MillstreamHuey("app", path=tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").write_text("x")
    with pytest.raises(millstream.MillstreamError):
        MillstreamHuey("app", path=tmp_path / "full")


def test_a_path_is_one_place_wherever_the_program_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    huey = MillstreamHuey("app", path="store")
    huey.storage.close()
    monkeypatch.chdir("/")
    huey.storage.enqueue(b"x")
    same = MillstreamHuey("app", path=f"file://{tmp_path}/store")
    assert same.storage.dequeue() == b"x"
    huey.storage.close()
    same.storage.close()


@pytest.mark.parametrize("name", ["my app", "../up", "x" * 130])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(millstream.InvalidArgument, match="name"):
        MillstreamHuey(name, path=tmp_path / "store")


def test_other_settings_than_stored_are_refused(make):
    make(lease=60.0)
    with pytest.raises(millstream.ConfigMismatch, match="lease"):
        make(lease=5.0)


@pytest.mark.parametrize(
    ("package", "least", "said"),
    [
        ("huey", (99,), "found 3"),
        ("no-such-framework", (1,), "not installed"),
    ],
)
def test_a_framework_that_does_not_fit_is_refused(package, least, said):
    with pytest.raises(ImportError, match=rf"{said}.*pip install 'millstream\[huey\]'"):
        contrib.require(package, "huey", least, (100,))


MODULES = {
    "apscheduler": "apscheduler",
    "celery": "celery",
    "django.backend": "django",
    "dramatiq": "dramatiq",
    "huey": "huey",
    "kombu": "kombu",
    "opentelemetry": "opentelemetry",
    "polars": "polars",
    "prometheus": "prometheus_client",
    "taskiq": "taskiq",
    "torch": "torch",
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_framework_that_cannot_be_imported_says_what_to_install(module, monkeypatch):
    """A package that is there by its metadata, and broken."""
    framework, named = MODULES[module], f"millstream.contrib.{module}"
    extra = module.split(".")[0]
    for name in [*sys.modules]:
        mine = name == named or (extra == "django" and name.startswith(named.rpartition(".")[0]))
        if mine or name.partition(".")[0] == framework:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, framework, None)
    with pytest.raises(ImportError, match=rf"pip install 'millstream\[{extra}\]'"):
        importlib.import_module(named)


@pytest.mark.slow
def test_its_benchmark_runs():
    root = HERE.parents[1]
    if not (root / "benchmarks").is_dir():
        pytest.skip("benchmarks/ is not here")
    command = [sys.executable, "-m", "benchmarks.contrib_huey", "50"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ratio" in done.stdout


def test_the_import_of_millstream_does_not_import_it():
    program = "import millstream, sys; sys.exit('millstream.contrib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_greenlets_wait_for_tasks_and_results_side_by_side(tmp_path):
    pytest.importorskip("gevent")
    program = """
        from gevent import monkey; monkey.patch_all()
        import sys, gevent
        from millstream.contrib.huey import MillstreamHuey

        huey = MillstreamHuey("app", path=sys.argv[1], durability="process")
        running = 0

        @huey.task()
        def meet(number):
            global running
            running += 1
            with gevent.Timeout(30):
                while running < 5:  # so five must run at once
                    gevent.sleep(0)
            return number

        results = [meet(number) for number in range(5)]
        consumer = huey.create_consumer(workers=5, worker_type="greenlet")
        consumer.start()
        print([result(blocking=True, timeout=30) for result in results])
        consumer.stop(graceful=True)
        huey.storage.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "store"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[0, 1, 2, 3, 4]\n", 0), done.stderr
