"""What most tests start from, and what none of them leaves behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import warnings

import pytest

import millstream
from millstream import RetryPolicy, _native
from millstream.store.store import _all_open as open_stores
from millstream.testing import clock

pytest_plugins = ["millstream.testing.conformance"]

SLOW = (
    "crash", "property", "test_backup", "test_benchmarks_smoke", "test_c_programs", "test_capacity",
    "test_cli_queue", "test_contrib_celery", "test_contrib_dramatiq", "test_contrib_storm",
    "test_contrib_torch", "test_demo", "test_every_call", "test_examples", "test_fork", "test_fuzz",
    "test_living", "test_planted_faults", "test_queue_corners", "test_queue_store", "test_reentry",
    "test_refusals", "test_suite", "test_transaction_waits", "test_typing", "test_web",
    "test_worker_processes", "test_worker_runs",
)  # fmt: skip
"""Folders and files of more than five seconds: kills, power cuts, models, sweeps, children."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1)


def pytest_configure(config):
    """One run is like the other, whatever it is started from.

    `MILLSTREAM_SEED` or `--hypothesis-seed` ask for other examples. A shell starts what it puts in
    the background with SIGINT ignored, and children inherit that: here they get it back.
    """
    here = os.path.dirname(__file__)  # for children that import a test's module
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        from hypothesis import settings
    except ImportError:  # its tests are skipped
        return
    settings.register_profile("fixed", derandomize=True)
    if not os.environ.get("MILLSTREAM_SEED") and config.getoption("hypothesis_seed", None) is None:
        settings.load_profile("fixed")


def pytest_collection_modifyitems(items):
    """What `-m "not slow"` leaves out, so that a developer has an answer in three minutes."""
    for item in items:
        if item.path.stem in SLOW or item.path.parent.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.did_pass = report.passed
    return report


def is_a(one, *kinds):
    """By its type alone: `isinstance` asks a proxy what it stands for, which may not be there."""
    return issubclass(type(one), kinds)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    """Before fixtures close: what a failed test holds, it holds in this very thread."""
    item.held = _native.held()
    if item.held:
        for seat in gc.get_objects():
            while is_a(seat, _native.Lock, _native.Word) and seat.mine:
                seat.release()


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """One failure stays one failure: what a test leaves open is closed before the next one.

    A test that passes and leaves something open fails here.
    """
    stores, cwd = set(open_stores()), os.getcwd()
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield
    left = [f"open: {store!r}" for store in open_stores() if store not in stores]
    left += [f"held: {name}" for name in request.node.held]
    passed = getattr(request.node, "did_pass", False)
    if left or not passed:
        close_all(stores)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        if signal.getsignal(number) is not handler:
            left.append(f"{number.name} is handled by {signal.getsignal(number)}")
            signal.signal(number, handler)
    if not os.path.exists(cwd) or os.getcwd() != cwd:
        left.append("the working directory is another one")
        os.chdir(cwd)
    if passed and left:
        pytest.fail(f"left behind: {'; '.join(left)}", pytrace=False)


def close_all(kept):
    """Close the stores but `kept`, and end the processes that a test began."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    for process in gc.get_objects():
        if is_a(process, subprocess.Popen) and process.returncode is None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    for store in set(open_stores()) - kept:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of what is open in the store
            try:
                store.close()
            except millstream.MillstreamError as error:
                print(f"{store!r}: {error}")


@pytest.fixture
def now():
    """The virtual clock, to `advance` instead of sleeping; named before `store`."""
    with clock() as virtual:
        yield virtual


@pytest.fixture
def store():
    """A store of level `process`, so that no test waits for a disk it does not test."""
    with millstream.temporary(durability="process") as store:
        yield store


@pytest.fixture(params=["process", "interval", "sync"])
def any_store(tmp_path, request):
    """A store of each level, for what holds at all of them."""
    with millstream.open(tmp_path / "store", durability=request.param) as opened:
        yield opened


@pytest.fixture
def stream(store):
    return store.stream("s")


@pytest.fixture
def q(store):
    """A queue that tries again at once; at the end its invariants hold."""
    made = store.queue("q", capacity=2000, retry=RetryPolicy(max_attempts=3, backoff=0.0))
    yield made
    if not made.closed:
        made._check()


@pytest.fixture
def queue(store):
    """A queue that tries each message twice, at once."""
    return store.queue("q", retry=RetryPolicy(max_attempts=2, backoff=0.0))


@pytest.fixture
def nothing_is_renewed():
    """No lease is renewed after the test."""
    yield
    gc.collect()
    assert _native.heartbeat_count() == 0
