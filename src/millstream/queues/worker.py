"""Workers: functions that are called with the messages of a queue, in threads or in processes.

`queue.worker(...)` registers a function, `run` works until SIGTERM or SIGINT, `Worker` is the
handle for programs that decide themselves when.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from millstream import _native
from millstream.errors import (
    InvalidArgument,
    InvalidType,
    MillstreamError,
    Reentered,
    WorkerError,
)
from millstream.options import check_timeout
from millstream.queues.loops import (
    LOG,
    SLICE_SECONDS,
    Counts,
    Loop,
    Mode,
    Options,
    check_options,
    sum_of,
)
from millstream.queues.worker_processes import EXIT_SECONDS, NOTICE_SECONDS, Processes

if TYPE_CHECKING:
    from millstream.queues.queue import Queue

__all__ = ["Counts", "Worker", "register", "run"]

Function = TypeVar("Function", bound=Callable[[Any], object])


# --- in threads -----------------------------------------------------------------------------------


def start_all(running: Threads | Processes, path: str) -> None:
    """Start the threads, all or none: nobody would know of some, which take messages for ever.

    Raises: StorageError where there can be none.
    """
    threads, running._threads = running._threads, []
    try:
        for thread in threads:
            _native.start(thread, path)
            running._threads.append(thread)
    except BaseException:
        running.ask(0.0)
        deadline = time.monotonic() + EXIT_SECONDS
        while running.alive and time.monotonic() < deadline:
            time.sleep(0.005)
        running.end()
        raise


class Threads:
    """Loops in threads of this process."""

    def __init__(self, queue: Queue, function: Callable[[Any], object], options: Options) -> None:
        self._loops = [Loop(queue, function, options) for _ in range(options.concurrency)]
        self._threads = [
            # Daemons: a function that never returns must not keep the process.
            threading.Thread(target=loop.run, name=f"{queue.name}-{number}", daemon=True)
            for number, loop in enumerate(self._loops)
        ]
        self.begun = _native.Flag()
        self.begun.set()

    @property
    def counts(self) -> Counts:
        """What was done until now."""
        return sum_of(loop.counts for loop in self._loops)

    @property
    def held(self) -> int:
        """How many messages they work on."""
        return sum(len(loop.held) for loop in self._loops)

    @property
    def error(self) -> BaseException | None:
        """What ended a loop that was not told to end."""
        return next((loop.error for loop in self._loops if loop.error), None)

    @property
    def alive(self) -> bool:
        """Does any still run?"""
        return any(thread.is_alive() for thread in self._threads)

    def ask(self, grace: float) -> None:
        """Take nothing more."""
        for loop in self._loops:
            loop.stopping.set()

    def check(self) -> None:
        """Reentered where one waits for what this thread holds."""
        for thread in self._threads:
            _native.join(thread, 0.0)

    not_begun = ""
    """Threads begin at once."""

    def await_end(self) -> None:
        """Wait a moment; Reentered where one waits for what this thread holds."""
        for thread in self._threads:
            _native.join(thread, 0.005)

    def end(self) -> None:
        """Give back what is still worked on."""
        for loop, thread in zip(self._loops, self._threads, strict=False):
            if thread.is_alive():
                with contextlib.suppress(Reentered):  # the thread is at it, and ends when it may
                    loop.release()


# --- waiting for the end --------------------------------------------------------------------------


def waits_for(queue: Queue, workers: Sequence[Worker]) -> str:
    """Why a queue is not empty, in words; "": it is."""
    ours = sum(worker.held for worker in workers)
    left = len(queue)
    if left == 0:
        return ""
    stats = queue.stats()
    elsewhere = max(0, stats.leased - ours)
    due = [queue._stored(slot, word) for _, _, slot, word in queue._scan(("delayed",), 1000)]
    first = min((message.due for message in due if message and message.due), default=None)
    next_due = f" (until {first.isoformat(' ', 'seconds')} at least)" if first else ""
    found = [
        (stats.ready, "ready"),
        (stats.delayed, f"delayed{next_due}"),
        (stats.held, "held behind an earlier one of their key"),
        (stats.leased - elsewhere, "worked on here"),
        (elsewhere, "leased elsewhere"),
    ]
    text = ", ".join(f"{count} {what}" for count, what in found if count)
    paused = "; it is paused: nothing is leased until resume()" if stats.paused else ""
    late = "".join(f"; {said}" for worker in workers if (said := worker._not_begun))
    return f"{left} not finished: {text or 'in a transaction'}{paused}{late}"


# --- what users see -------------------------------------------------------------------------------


class Worker:
    """A function and the queue whose messages it is called with; between `start` and `stop`.

    `queue.worker` registers one for `run`; a program that wants to start and stop by itself makes
    its own. Use it in a `with`: the block's end stops it. Thread-safe.

    Args:
        queue: where messages come from.
        function: called with a message, or with a list of them where `batch` is given. Returning
            acknowledges, raising counts a failure; `Retry`, `Snooze` and `Reject` say what else.
        concurrency: how many calls at a time, each in a thread or process of its own.
        mode: "thread", or "process": spawned ones, which import the function by its name.
        time_limit: seconds; after so long a lease is renewed no more, and runs out. A worker
            process that is at it still is ended, and another started.
        batch: call with lists of up to so many messages. The function may end some by itself
            (`m.nack()`, say); the others are acknowledged.
        linger: seconds to wait for a batch to fill.

    >>> import millstream
    >>> from millstream import Worker
    >>> with millstream.temporary() as store:
    ...     mail = store.queue("mail")
    ...     _ = mail.put_many([b"ann", b"bob"])
    ...     seen = []
    ...     with Worker(mail, lambda message: seen.append(message.value)):
    ...         _ = mail.join(timeout=30)
    ...     sorted(seen)
    [b'ann', b'bob']
    """

    def __init__(
        self,
        queue: Queue,
        function: Callable[[Any], object],
        *,
        concurrency: int = 1,
        mode: Mode = "thread",
        time_limit: float = 300.0,
        batch: int | None = None,
        linger: float = 0.0,
    ) -> None:
        self.queue = queue
        self.function = function
        self.options = check_options(concurrency, mode, time_limit, batch, linger)
        check_function(function, self.options.mode)
        self._running: Threads | Processes | None = None
        self._process = os.getpid()
        self._run: Run | None = None
        """The call of `run` that began it; None: `start` did."""
        self._lock = _native.Lock(f"{queue.path}: its worker")
        self._before = Counts()
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin to take messages; processes have begun when it returns. Again: nothing happens.

        Raises: WorkerError where processes cannot start, StorageError where threads cannot; Closed.
        Reentered in a signal handler or finalizer for processes, where the call under it holds
        anything that they may need; threads begin there as well, and wait until it has returned.
        """
        self._begin()
        running = self._running
        try:
            if running is not None:  # else it was stopped meanwhile
                running.begun.wait()
        except BaseException:  # Ctrl-C
            self._end()
            raise
        if isinstance(self.error, WorkerError):
            self._end()
            raise self.error

    def _begin(self, run: Run | None = None) -> None:
        """The first half of `start`: do not wait for processes. Refused where another `run` is."""
        if run is not None and self._is_ours:
            raise self._runs_already(run)
        held = _native.held()
        if held and self.options.mode == "process" and not self._is_ours:
            raise Reentered(
                f"{self.queue.path}: worker processes are not started in the middle of a call of"
                f" this thread, which has: {', '.join(held)}. They could wait for it: start them"
                " when it has returned"
            )
        with self._lock:
            if self._is_ours:
                if run is not None:
                    raise self._runs_already(run)
                return
            self.queue._check_writable()
            self._error = None
            kind = Threads if self.options.mode == "thread" else Processes
            self._running = None  # of the parent, where this is a fork
            self._process = os.getpid()
            running = kind(self.queue, self.function, self.options)
            atexit.register(self.stop, 0.0)
            self._run = run
            self._running = running  # before they begin: whatever comes between, they are known
            try:
                start_all(running, self.queue.path)
            except BaseException:
                self._running = None
                atexit.unregister(self.stop)
                raise

    def _runs_already(self, run: Run) -> MillstreamError:
        """Why a `run` is refused: it would end, or hear the signals, of the one that is there."""
        text = f"{self.queue.path}: its workers run already"
        if self._run is not None and self._run.thread == run.thread:
            return Reentered(
                f"{text}, by the run() of this thread that a signal handler, finalizer or callback"
                " is in the middle of; they go on: put messages, and leave the work to them"
            )
        return InvalidArgument(
            f"{text}, by another thread's run(); they go on: wait for that call, or have more of"
            " them by concurrency=; join() of the queue waits until it is empty"
        )

    @property
    def _is_ours(self) -> bool:
        """Does it run, and in this process, not in the one of which this is a fork?"""
        return self._running is not None and self._process == os.getpid()

    def stop(self, grace: float = 30.0) -> Counts:
        """Take nothing more, wait for the calls that run, and give back what is not done then.

        Args:
            grace: seconds to wait. Threads whose function still runs after it are left behind, and
                what they do to their message comes to nothing; processes are ended.

        Returns: what was done since the worker was made.

        Raises: WorkerError where processes died and could not be replaced; they are stopped.
        Reentered in a signal handler or finalizer, where a thread waits for what the call under it
        holds, or a process did not end at once and may do so: it takes nothing more, and ends when
        that has returned; stop it again then.
        """
        self._ask(grace)
        deadline = time.monotonic() + (check_timeout(grace) or 0.0)
        while (running := self._running) and self.alive and time.monotonic() < deadline:
            running.await_end()
        told = self._running is None  # by an earlier call
        counts = self._end()
        if isinstance(self.error, WorkerError) and not told:
            raise self.error
        return counts

    def _ask(self, grace: float) -> None:
        """The first half of `stop`: take nothing more."""
        seconds = check_timeout(grace) or 0.0
        if (running := self._running) and self._is_ours:
            running.ask(seconds)

    def _end(self) -> Counts:
        """The second half of `stop`: give back what is not done, now."""
        if (running := self._running) and self._is_ours:
            running.end()
            with self._lock:
                if self._running is running:  # nobody else was quicker
                    self._error = running.error
                    self._before, self._running = self._before + running.counts, None
                    atexit.unregister(self.stop)
        return self._before

    def _check(self) -> None:
        """Raise where it would wait for this thread."""
        if (running := self._running) and self._is_ours:
            running.check()

    @property
    def counts(self) -> Counts:
        """What was done until now."""
        running = self._running
        return self._before + (running.counts if running and self._is_ours else Counts())

    @property
    def alive(self) -> bool:
        """Does any of its threads or processes still run?"""
        running = self._running
        return running is not None and self._is_ours and running.alive

    @property
    def error(self) -> BaseException | None:
        """What ended one of its threads that was not told to end, or why processes cannot start."""
        running = self._running
        return running.error if running else self._error

    @property
    def waits_for(self) -> str:
        """What keeps the queue from being empty, in words; "": nothing does."""
        return waits_for(self.queue, [self])

    @property
    def _not_begun(self) -> str:
        running = self._running
        return running.not_begun if running and self._is_ours else ""

    @property
    def held(self) -> int:
        """How many messages its threads or processes work on now."""
        running = self._running
        return running.held if running and self._is_ours else 0

    @property
    def pids(self) -> list[int]:
        """Process ids of its processes."""
        running = self._running
        return running.pids if isinstance(running, Processes) and self._is_ours else []

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self.stop()
        except WorkerError:
            if raised[0] is None:  # else that comes first; ours is in the log
                raise

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        state = f"running, {self.counts}" if self._is_ours else "not running"
        return f"<Worker of queue {self.queue.name!r}: {name}, {self.options.mode}, {state}>"


def check_function(function: object, mode: Mode) -> None:
    """Can it be called, and where processes are to call it, imported?"""
    with _native.loading:
        import inspect
    if not callable(function):
        raise InvalidType(f"worker {function!r}: expected a function")
    if inspect.iscoroutinefunction(function):
        raise InvalidType(f"worker {function!r}: a coroutine; take messages with `async for`")
    name = getattr(function, "__qualname__", None)
    if mode == "process" and (name is None or "<" in name):
        raise InvalidArgument(
            f"worker {name or function!r}: a process imports its function by name; define it at the"
            " top of a module"
        )


def register(
    queue: Queue,
    *,
    concurrency: int = 1,
    mode: Mode = "thread",
    time_limit: float = 300.0,
    batch: int | None = None,
    linger: float = 0.0,
) -> Callable[[Function], Function]:
    """What `queue.worker(...)` is: a decorator that registers for `run` and changes nothing."""
    check_options(concurrency, mode, time_limit, batch, linger)

    def decorate(function: Function) -> Function:
        made = Worker(
            queue,
            function,
            concurrency=concurrency,
            mode=mode,
            time_limit=time_limit,
            batch=batch,
            linger=linger,
        )
        queue._workers.append(made)
        return function

    return decorate


def run(*queues: Queue, grace: float = 30.0, until_empty: bool = False) -> Counts:
    """Run the workers that were registered with these queues, until SIGTERM or SIGINT.

    Then they take nothing more, finish what they work on, and give back, uncounted, what is not
    done after `grace` seconds (a second signal: at once). Signals are heard in the main thread
    only, and get their old handlers back in the end.

    Args:
        queues: with at least one worker each.
        grace: seconds.
        until_empty: return also when nothing is left to do in any of the queues: for scripts. It
            waits for all that is not finished: messages that are delayed, also for a retry, leased
            by others, held behind one of their key, or in a queue that is paused. After 5 s
            without a message done, and then less and less often, a warning says what; ``waits_for``
            of a `Worker` says it when asked.

    Returns: what was done; it prints as text.

    Raises: InvalidArgument (a queue without workers); WorkerError (worker processes cannot start,
    or somebody else stopped the workers); StorageError (threads cannot); Closed; what ended a
    worker that was not told to end. Reentered in a signal handler or finalizer, where a worker
    waits for what the call under it holds, or is a process, which may.

    One call at a time runs the workers of a queue: a second one raises InvalidArgument, or
    Reentered where it comes in the middle of the first, and the first goes on. A signal that comes
    in a `run` of a handler ends the one under it, of other queues, as well.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     mail = store.queue("mail")
    ...     _ = mail.put(b"ann")
    ...     @mail.worker()
    ...     def send(message):
    ...         print("to", message.value)
    ...     print(millstream.run(mail, until_empty=True))
    to b'ann'
    1 done, 0 failed, 0 released
    """
    queues = tuple({id(queue): queue for queue in queues}.values())
    workers = [worker for queue in queues for worker in queue._workers]
    idle = [queue.name for queue in queues if not queue._workers]
    if not workers or idle:
        raise InvalidArgument(f"no workers to run: {', '.join(idle) or 'no queue was given'}")
    check_timeout(grace)
    this = Run(threading.get_ident())
    with hearing(signal.SIGTERM, signal.SIGINT) as heard:
        try:
            for worker in workers:
                worker._begin(this)
            before = sum_of(worker._before for worker in workers)
            signals = int(watch(workers, this, queues if until_empty else (), heard))
            error = next((worker.error for worker in workers if worker.error), None)
            for worker in workers:
                worker._ask(grace)
            deadline = time.monotonic() + grace
            while any(worker.alive for worker in workers) and time.monotonic() < deadline:
                for worker in workers:
                    worker._check()
                heard.wait(signals, 0.01)
                if heard.rung > signals:
                    break
        finally:
            after = sum_of(worker._end() for worker in workers if worker._run is this)
    counts = Counts(*(now - then for now, then in zip(after, before, strict=True)))
    LOG.info("%s: %s", ", ".join(queue.name for queue in queues), counts)
    if error is not None:
        raise error
    return counts


class Run:
    """One call of `run`: it ends the workers that it began, no others."""

    def __init__(self, thread: int) -> None:
        self.thread = thread


def watch(
    workers: Sequence[Worker], this: Run, queues: Sequence[Queue], heard: _native.Bell
) -> bool:
    """Wait for a signal, for an error, or, where queues are given, for them to be empty.

    Returns: was it a signal?
    """
    done = Counts()
    pause = NOTICE_SECONDS[0]
    notice = time.monotonic() + pause
    while not any(worker.error for worker in workers):
        for worker in workers:
            worker._check()
            if worker._run is not this or not worker._is_ours:
                if not threading.main_thread().is_alive():  # they were stopped by our own exit
                    return False
                raise WorkerError(
                    f"{worker.queue.path}: its workers were stopped by somebody else, while run()"
                    " waited for them"
                )
        # No wait of the standard library: one with a time-out did not end after a slow handler of a
        # signal (CPython 3.11).
        heard.wait(0, 0.01 if queues else SLICE_SECONDS)
        if heard.rung:
            return True
        if not queues:
            continue
        if all(len(queue) == 0 for queue in queues):
            return False
        before, done = done, sum_of(worker.counts for worker in workers)
        if done != before:
            pause = NOTICE_SECONDS[0]
            notice = time.monotonic() + pause
        elif time.monotonic() >= notice:
            for queue in queues:
                why = waits_for(queue, [worker for worker in workers if worker.queue is queue])
                if why:
                    LOG.warning("%s: run(until_empty=True) waits: %s", queue.name, why)
            pause = min(2 * pause, NOTICE_SECONDS[1])
            notice = time.monotonic() + pause
    return False


class Hearing:
    """The handler of signals while a `run` waits for them: rings a bell, which has no lock."""

    def __init__(self) -> None:
        self.bell = _native.Bell()
        self.before: dict[int, Any] = {}

    def __call__(self, number: int, frame: object) -> None:
        self.bell.ring()
        under = self.before.get(number)
        if isinstance(under, Hearing):  # a run in the middle of another: both are to end
            under(number, frame)


@contextlib.contextmanager
def hearing(*signals: signal.Signals) -> Iterator[_native.Bell]:
    """A bell that each of these signals rings; none does in a thread that is not the main one."""
    heard = Hearing()
    if threading.current_thread() is not threading.main_thread():
        yield heard.bell
        return
    try:
        for each in signals:
            heard.before[each] = signal.getsignal(each)
            signal.signal(each, heard)
        yield heard.bell
    finally:
        for number, handler in heard.before.items():
            signal.signal(number, handler)


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Worker.__module__ = "millstream"
run.__module__ = "millstream"
register.__module__ = "millstream.worker"
