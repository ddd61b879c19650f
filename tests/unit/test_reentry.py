"""Calls from signal handlers and finalizers, in the middle of other calls of the same thread."""

import ast
import asyncio
import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import reentry_calls
from timing import until

import millstream
from millstream import _native

SEED = int(os.environ.get("MILLSTREAM_SEED", "1"))
POINTS = int(os.environ.get("MILLSTREAM_REENTRY_POINTS", "5"))


@pytest.mark.parametrize("outer", reentry_calls.CALLS)
def test_any_call_may_interrupt_any_call(outer):
    """At lines all over a call every other one is made: it works, or says why not, at once."""
    print("seed", SEED)
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("reentry_calls.py"), outer, str(POINTS),
         str(SEED)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-6000:]


@pytest.mark.parametrize("kind", ["lock", "word"])
def test_an_interrupt_leaves_nothing_taken(store, kind):
    """Ctrl-C where a `with` begins: Python 3.14 may raise it there, and calls no `__exit__`."""
    taken = _native.Lock("of a test") if kind == "lock" else store._transactions.journal().holding()
    left = []
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(300):
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-4)
                while True:
                    with taken:
                        pass
            if taken.mine:
                left.append(taken.release())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(left) == 0


SHARE = 1 if os.environ.get("MILLSTREAM_FULL") else 20


def test_public_calls_within_public_calls(tmp_path):
    """All of them by `MILLSTREAM_FULL`, else one pair of 20, others with each seed."""
    print("seed", SEED)
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("reentry_pairs.py"), tmp_path, str(SHARE),
         str(SEED)],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )  # fmt: skip
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr[-6000:]


@pytest.mark.parametrize("kind", ["signals", "finalizers"])
def test_calls_at_any_instruction(kind):
    """A timer's handler, and `__del__` at nearly any allocation, make calls of every kind."""
    print("seed", SEED)
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning",
         Path(__file__).with_name("reentry_storm.py"), kind, "100", str(SEED)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-6000:]


# --- closing in the middle of a call --------------------------------------------------------------


def test_another_store_is_opened_and_closed_in_the_middle_of_any_call(tmp_path, store):
    """A handler's `with millstream.open(other)` has nothing to do with what its thread holds."""
    with store._lock, store.stream("s")._log(0).syncing:
        with millstream.open(tmp_path / "other") as other:
            other.stream("s").append(b"1")
        with millstream.open(tmp_path / "other", mode="r") as other:
            assert other.stream("s").next_offset(0) == 1
    assert _native.held() == []


def test_another_handle_of_the_store_is_closed_in_the_middle_of_a_call(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        with store._lock, millstream.open(tmp_path / "s") as again:
            again.stream("s").append(b"1")
        assert again.closed
        store.session.members.enter_gate(10)  # whoever leaves then says nothing of who comes
        try:
            with pytest.raises(millstream.Reentered):
                millstream.open(tmp_path / "s")
        finally:
            store.session.members.leave_gate()
        second = millstream.open(tmp_path / "s")
        store.session.members.enter_gate(10)
        try:
            second.close()
        finally:
            store.session.members.leave_gate()
        assert second.closed
    with millstream.open(tmp_path / "s", create=False) as store:
        assert store.stream("s").next_offset(0) == 1


def test_a_store_says_why_it_is_not_closed_in_the_middle_of_its_call(tmp_path):
    store = millstream.open(tmp_path / "s")
    held = [
        store._lock,
        store._streams.cache._lock,
        store.stream("s")._log(0).syncing,
        store.stream("s")._log(0).maintaining,
        _native.loading,
    ]
    for lock in held:
        with lock:
            with pytest.raises(millstream.Reentered, match="is open still") as raised:
                store.close()
            assert lock.name in str(raised.value)
            assert not store.closed
    store.stream("s").append(b"1")
    store.close()
    assert store.closed


class Closing:
    """A codec that closes the store."""

    name = "closing"

    def __init__(self, store):
        self.store = store

    def encode(self, value):
        self.store.close()
        return value

    def decode(self, data):
        self.store.close()
        return bytes(data)


def test_a_codec_and_an_iterator_close_the_store(tmp_path):
    """What a user gave is called where the store can be closed; the call says that it is."""
    store = millstream.open(tmp_path / "s")
    with pytest.raises(millstream.Closed):
        store.queue("q", codec=Closing(store)).put(b"1")
    assert store.closed

    def rows(store):
        yield b"1"
        store.close()
        yield b"2"

    store = millstream.open(tmp_path / "s")
    with pytest.raises(millstream.Closed):
        store.stream("s").append_many(rows(store))
    assert store.closed
    store = millstream.open(tmp_path / "s")
    queue = store.queue("q", codec=Closing(store))
    other = millstream.open(tmp_path / "s")
    other.queue("q").put(b"m")
    other.close()
    assert queue.get(timeout=5).value == b"m"
    assert store.closed


def test_what_cannot_be_closed_now_goes_on(tmp_path):
    """Its own thread waits for what the call under the close holds, by another handle."""
    first = millstream.open(tmp_path / "s")
    second = millstream.open(tmp_path / "s", durability="interval")
    stream = second.stream("s")
    with first.stream("s")._log(0).syncing:
        stream.append(b"1")
        until(lambda: second._background._synced_at)
        with pytest.raises(millstream.Reentered):
            second.close()
        assert not second.closed
        stream.append(b"2")
    until(lambda: stream.durable_offset(0) == 2)
    second.close()
    first.close()
    with millstream.open(tmp_path / "s") as store:
        assert store.stream("s").next_offset(0) == 2


FAILING = """
import millstream, pytest

def test_fails_and_holds(store, tmp_path):
    global kept
    store.stream("s").append(b"1")
    kept = store._lock
    kept.acquire()
    assert 0, "on purpose"

def test_fails_and_holds_what_it_opened(tmp_path):
    global word
    opened = millstream.open(tmp_path / "s")
    word = opened.stream("s")._log(0).syncing
    word.take(1)
    assert 0, "on purpose"

def test_next(store, tmp_path):
    store.stream("s").append(b"1")
    with millstream.open(tmp_path / "s") as one:
        one.queue("q").put(b"1")

def test_last(store):
    import gc
    gc.collect()
"""


def test_one_failure_stays_one_failure(tmp_path):
    """A failed test whose lock is never given back lets those behind it open and close theirs."""
    (tmp_path / "test_failing.py").write_text(FAILING)
    (tmp_path / "conftest.py").write_text("from timing import *\n")
    here = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c",
         here.parent / "pyproject.toml", "--rootdir", tmp_path, "-p", "conftest",
         tmp_path / "test_failing.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(here)},
    )  # fmt: skip
    assert "2 failed, 2 passed" in ended.stdout, ended.stdout[-6000:]


# --- imports at first use -------------------------------------------------------------------------


def late_imports(tree):
    """(line, names) of the imports in functions that are not made in a `with` of `loading`."""
    found = []

    def walk(node, late, loading):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late = True
        if isinstance(node, ast.With):
            loading = loading or any("loading" in ast.unparse(item) for item in node.items)
        if isinstance(node, ast.Import | ast.ImportFrom) and late and not loading:
            names = [alias.name for alias in node.names]
            found.append((node.lineno, [getattr(node, "module", None) or name for name in names]))
        for child in ast.iter_child_nodes(node):
            walk(child, late, loading)

    walk(tree, False, False)
    return found


def test_imports_at_first_use_are_made_under_their_lock():
    """Else what interrupts one gets a module that is half there, as a raw ImportError."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import millstream.store.store, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    package = Path(millstream.__file__).parent
    wrong = []
    for path in sorted(package.rglob("*.py")):
        # A program, which has no handlers but its own; and what is imported with its framework, or
        # with the client of a server, whose loop answers no handler either.
        if {package / "cli", package / "contrib", package / "engines"} & {*path.parents}:
            continue
        for line, names in late_imports(ast.parse(path.read_text())):
            if not set(names) <= set(loaded):
                wrong.append(f"{path.relative_to(package)}:{line}: {names}")
    for path in sorted((package / "_binding").glob("*.pxi")):
        within = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := re.match(r" +(?:from ([\w.]+) )?import (\w+)", line):
                if "loading" not in within and (found[1] or found[2]) not in loaded:
                    wrong.append(f"{path.name}:{number}: {line.strip()}")
            elif line.strip():
                within = line
    assert not wrong, wrong


def test_there_is_no_other_kind_of_lock():
    """Those of `threading` are waited for for ever by who has them, and by children of a fork."""
    package = Path(millstream.__file__).parent
    other = re.compile(r"threading\.(?:Lock|RLock|Event|Condition|Semaphore|Barrier)\b")
    # These stand on the public face alone, as a program of a user does, whose locks they have.
    users = {package / "cli", package / "contrib", package / "engines"}
    files = [path for path in package.rglob("*.py") if not users & {*path.parents}]
    files += package.rglob("*.pxi")
    assert files
    found = [f"{path.name}: {one}" for path in files for one in other.findall(path.read_text())]
    assert not found, found


LAZY = """
import sys, millstream
names, seen = sys.argv[1:], []

class Interrupt:
    # The handler: asks for every lazy name in the middle of the import of another one.
    def __call__(self, frame, event, _):
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("millstream."):
            return None
        if event == "line":
            sys.settrace(None)
            try:
                seen.append(getattr(millstream, names[len(seen) % len(names)]))
            except millstream.Reentered:
                seen.append("Reentered")
            sys.settrace(self)
        return self

for name in names:
    sys.settrace(Interrupt())
    try:
        getattr(millstream, name)
    finally:
        sys.settrace(None)
for name in names:
    getattr(millstream, name)
assert "Reentered" in seen
"""


def test_lazy_names_are_asked_for_in_the_middle_of_their_import():
    """They are whole, or `Reentered` says that they are being imported."""
    lazy = [*millstream._MODULES, *(name for names in millstream._HOMES.values() for name in names)]
    for first in range(0, len(lazy), 8):
        ended = subprocess.run(
            [sys.executable, "-c", LAZY, *lazy[first:], *lazy[:first]],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-6000:]


def test_a_lazy_name_whose_module_is_there_is_had_in_the_middle_of_an_import(store, monkeypatch):
    """So a handler can pickle a handle; `pickle` makes a raw error of what the name raises."""
    stream = store.stream("s")
    monkeypatch.delitem(vars(millstream), "Stream", raising=False)
    with _native.loading:
        pickled = pickle.dumps(stream)
    assert pickle.loads(pickled).name == "s"


def test_a_call_in_the_middle_of_a_users_own_import_says_so():
    """`import millstream.queues.queue` by a user, interrupted by a handler that makes a queue."""
    work = """
import sys, millstream
store = millstream.temporary()
said = []
class Trace:
    def __call__(self, frame, event, _):
        if frame.f_globals.get("__name__") == "millstream.queues.queue" and event == "line":
            sys.settrace(None)
            try:
                store.queue("q")
            except millstream.Reentered as error:
                said.append(str(error))
        return self
sys.settrace(Trace())
import millstream.queues.queue
sys.settrace(None)
assert said and "being imported" in said[0], said
store.queue("q").put(b"1")
store.close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", work], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-6000:]


def test_close_lets_a_finalizer_in_its_own_thread_go_first(tmp_path, monkeypatch):
    """It waits for the store, which close has, and close for the thread."""
    for number in range(5):
        store = millstream.open(tmp_path / f"s{number}", durability="interval")
        called, made, stop = [], threading.Event(), store._background.stop

        def sync(*_, store=store, called=called, made=made):
            if not called and made.wait(60):
                called.append(True)
                with contextlib.suppress(millstream.Reentered), store._lock:
                    pass  # a call that has found the store open

        def stop_later(made=made, called=called, stop=stop):
            made.set()
            until(lambda: called)  # it waits for the store by now; if not, this shows less
            stop()

        monkeypatch.setattr(store._background, "_note_time", sync)
        monkeypatch.setattr(store._background, "stop", stop_later)
        store.stream("s").append(b"1")
        store.close()
        assert store.closed and called


def test_package_that_cannot_be_read_any_more_is_an_error_of_ours(tmp_path):
    """As after a process gave up its user or its root; the guide says to ask for names before."""
    script = """
import sys, millstream
millstream.__path__[:] = []
try:
    millstream.open(sys.argv[1])
except millstream.StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, check=True
    )
    assert "No module named 'millstream.store'" in done.stdout


def test_a_loop_of_a_handler_puts_in_the_middle_of_a_sync(tmp_path, monkeypatch):
    """A thread that puts for the loop would wait for the sync that its own handler holds up."""
    with millstream.open(tmp_path / "store", durability="sync") as store:
        queue = store.queue("q")
        queue.put(b"before")
        sync, seen = queue._files.sync, []

        def interrupted():
            monkeypatch.setattr(queue._files, "sync", sync)
            seen.append(asyncio.run(queue.aput(b"within", timeout=0)))
            sync()

        monkeypatch.setattr(queue._files, "sync", interrupted)
        queue.flush()
        assert len(seen) == 1
        assert [message.value for message in queue.peek(5)] == [b"before", b"within"]
