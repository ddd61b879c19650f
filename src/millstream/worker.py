"""Workers: functions that are called with the messages of a queue, in threads or in processes.

`queue.worker(...)` registers a function, `run` works until SIGTERM or SIGINT, `Worker` is the
handle for programs that decide themselves when.
"""

from __future__ import annotations

import atexit
import contextlib
import queue as standard
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from millstream.errors import InvalidArgument, InvalidType
from millstream.loops import LOG, SLICE_SECONDS, Counts, Loop, Mode, Options, check_options, sum_of
from millstream.options import check_timeout

if TYPE_CHECKING:
    from millstream.queue import Queue

__all__ = ["Counts", "Worker", "register", "run"]

Function = TypeVar("Function", bound=Callable[[Any], object])

BACKOFF_SECONDS = (0.1, 30.0)
"""How long until a worker process that ended is replaced: at first, and at most."""
EXIT_SECONDS = 5.0
"""How long a worker process may take to give back what it has."""
EXIT_OVERDUE = 75


# --- many loops -----------------------------------------------------------------------------------


class Threads:
    """Loops in threads of this process."""

    def __init__(self, queue: Queue, function: Callable[[Any], object], options: Options) -> None:
        self._loops = [Loop(queue, function, options) for _ in range(options.concurrency)]
        self._threads = [
            # Daemons: a function that never returns must not keep the process.
            threading.Thread(target=loop.run, name=f"{queue.name}-{number}", daemon=True)
            for number, loop in enumerate(self._loops)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def counts(self) -> Counts:
        """What was done until now."""
        return sum_of(loop.counts for loop in self._loops)

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

    def end(self) -> None:
        """Give back what is still worked on."""
        for loop, thread in zip(self._loops, self._threads, strict=True):
            thread.join(0.0)
            if thread.is_alive():
                loop.release()


class Processes:
    """Loops in processes of their own, each watched by a thread that replaces it when it dies."""

    def __init__(self, queue: Queue, function: Callable[[Any], object], options: Options) -> None:
        import multiprocessing

        self._context = multiprocessing.get_context("spawn")
        self._arguments = (queue, function, options)
        self._name = queue.name
        self._stopping = threading.Event()
        self._grace = 0.0
        self._lock = threading.Lock()
        self._counts = Counts()
        self._children: dict[int, tuple[Any, Any]] = {}
        self._threads = [
            threading.Thread(target=self._supervise, args=(number,), daemon=True)
            for number in range(options.concurrency)
        ]
        for thread in self._threads:
            thread.start()

    error: BaseException | None = None

    @property
    def counts(self) -> Counts:
        """What was done until now; of a child that was killed, up to its last report."""
        with self._lock:
            return self._counts

    @property
    def alive(self) -> bool:
        """Does any still run?"""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def pids(self) -> list[int]:
        """Process ids of those that run now."""
        with self._lock:
            return [process.pid for process, _ in self._children.values()]

    def _supervise(self, number: int) -> None:
        backoff = BACKOFF_SECONDS[0]
        while not self._stopping.is_set():
            began = time.monotonic()
            code = self._run_one(number)
            if self._stopping.is_set():
                return
            if time.monotonic() - began > BACKOFF_SECONDS[1]:
                backoff = BACKOFF_SECONDS[0]
            LOG.warning(
                "%s: a worker process ended with %s; next in %g s", self._name, code, backoff
            )
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, BACKOFF_SECONDS[1])

    def _run_one(self, number: int) -> int | None:
        """Run a child until it ends; return its exit code."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=child, args=(theirs, *self._arguments))
        process.start()
        theirs.close()
        with self._lock:
            self._children[number] = process, ours
            late = self._stopping.is_set()
        if late:
            tell(ours, self._grace)
        with ours:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    counts = Counts(*ours.recv())
                    with self._lock:
                        self._counts += counts
            process.join()
            with self._lock:
                del self._children[number]
        code = process.exitcode
        process.close()
        return code

    def ask(self, grace: float) -> None:
        """Take nothing more; give back after `grace` seconds what is still worked on."""
        with self._lock:
            self._grace = grace
            self._stopping.set()
            children = list(self._children.values())
        for _, connection in children:
            tell(connection, grace)

    def end(self) -> None:
        """Wait a moment for the children to give back what they have, then kill who remains."""
        self.ask(0.0)
        deadline = time.monotonic() + EXIT_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for process, _ in self._children.values():
                process.kill()  # its leases end with it
        for thread in self._threads:
            thread.join(EXIT_SECONDS)


def tell(connection: Any, grace: float) -> None:
    """Tell a child to stop, unless it is gone."""
    with contextlib.suppress(OSError, ValueError):
        connection.send(grace)


def child(
    connection: Any, queue: Queue, function: Callable[[Any], object], options: Options
) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent hears it too
    loop = Loop(queue, function, options)
    # By a thread: the handler may interrupt this one while it holds the event's lock.
    signal.signal(
        signal.SIGTERM, lambda *_: threading.Thread(target=loop.stopping.set, daemon=True).start()
    )
    reports = Reports(connection, loop)
    threading.Thread(target=reports.run, daemon=True).start()
    loop.run()
    reports.send()
    if loop.error is not None:
        raise loop.error


class Reports:
    """What a worker process tells its parent, and hears from it."""

    def __init__(self, connection: Any, loop: Loop) -> None:
        self._connection = connection
        self._loop = loop
        self._sent = Counts()
        self._lock = threading.Lock()

    def send(self) -> None:
        """Tell what was done since the last time."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            counts = self._loop.counts
            new = [now - before for now, before in zip(counts, self._sent, strict=True)]
            if any(new):
                self._connection.send(new)
                self._sent = counts

    def run(self) -> None:
        """Report, listen, and end the process when time is up."""
        import os

        loop = self._loop
        deadline = float("inf")
        heard = True
        while True:
            try:
                if not heard:
                    time.sleep(SLICE_SECONDS)
                elif self._connection.poll(
                    min(SLICE_SECONDS, max(0.0, deadline - time.monotonic()))
                ):
                    deadline = time.monotonic() + self._connection.recv()
                    loop.stopping.set()
            except (EOFError, OSError):  # the parent is dead
                heard = False
                loop.stopping.set()
            self.send()
            begun = loop.begun
            if begun is not None and time.monotonic() - begun > loop.options.time_limit:
                loop.fail_overdue()
            elif time.monotonic() < deadline:
                continue
            else:
                loop.release()
            self.send()
            os._exit(EXIT_OVERDUE)  # the function may never return


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
    >>> from millstream.worker import Worker
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
        self._before = Counts()

    def start(self) -> None:
        """Begin to take messages. Nothing more where it has begun."""
        if self._running is None:
            kind = Threads if self.options.mode == "thread" else Processes
            self._running = kind(self.queue, self.function, self.options)
            atexit.register(self.stop, 0.0)

    def stop(self, grace: float = 30.0) -> Counts:
        """Take nothing more, wait for the calls that run, and give back what is not done then.

        Args:
            grace: seconds to wait. Threads whose function still runs after it are left behind, and
                what they do to their message comes to nothing; processes are ended.

        Returns: what was done since the worker was made.
        """
        self.ask(grace)
        deadline = time.monotonic() + (check_timeout(grace) or 0.0)
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.end()

    def ask(self, grace: float) -> None:
        """The first half of `stop`: take nothing more."""
        if self._running is not None:
            self._running.ask(check_timeout(grace) or 0.0)

    def end(self) -> Counts:
        """The second half of `stop`: give back what is not done, now."""
        if self._running is not None:
            self._running.end()
            self._before += self._running.counts
            self._running = None
            atexit.unregister(self.stop)
        return self._before

    @property
    def counts(self) -> Counts:
        """What was done until now."""
        return self._before + (self._running.counts if self._running else Counts())

    @property
    def alive(self) -> bool:
        """Does any of its threads or processes still run?"""
        return self._running is not None and self._running.alive

    @property
    def error(self) -> BaseException | None:
        """What ended one of its threads that was not told to end."""
        return self._running.error if self._running else None

    @property
    def pids(self) -> list[int]:
        """Process ids of its processes."""
        return self._running.pids if isinstance(self._running, Processes) else []

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        state = "not running" if self._running is None else f"running, {self.counts}"
        return f"<Worker of queue {self.queue.name!r}: {name}, {self.options.mode}, {state}>"


def check_function(function: object, mode: Mode) -> None:
    """Can it be called, and where processes are to call it, imported?"""
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
        until_empty: return also when nothing is left to do in any of the queues: for scripts.

    Returns: what was done; it prints as text.

    Raises: InvalidArgument (a queue without workers); what ended a worker that was not told to end.

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
    workers = [worker for queue in queues for worker in queue._workers]
    idle = [queue.name for queue in queues if not queue._workers]
    if not workers or idle:
        raise InvalidArgument(f"no workers to run: {', '.join(idle) or 'no queue was given'}")
    check_timeout(grace)
    before = sum_of(worker.counts for worker in workers)
    with hearing(signal.SIGTERM, signal.SIGINT) as heard:
        try:
            for worker in workers:
                worker.start()
            watch(workers, queues if until_empty else (), heard)
            error = next((worker.error for worker in workers if worker.error), None)
            for worker in workers:
                worker.ask(grace)
            deadline = time.monotonic() + grace
            while any(worker.alive for worker in workers) and time.monotonic() < deadline:
                with contextlib.suppress(standard.Empty):
                    heard.get(timeout=0.01)
                    break
        finally:
            after = sum_of(worker.end() for worker in workers)
    counts = Counts(*(now - then for now, then in zip(after, before, strict=True)))
    LOG.info("%s: %s", ", ".join(queue.name for queue in queues), counts)
    if error is not None:
        raise error
    return counts


def watch(workers: list[Worker], queues: Sequence[Queue], heard: standard.SimpleQueue[int]) -> None:
    """Wait for a signal, for an error, or, where queues are given, for them to be empty."""
    while not any(worker.error for worker in workers):
        try:
            heard.get(timeout=0.01 if queues else SLICE_SECONDS)
        except standard.Empty:
            if queues and all(len(queue) == 0 for queue in queues):
                return
        else:
            return


@contextlib.contextmanager
def hearing(*signals: signal.Signals) -> Iterator[standard.SimpleQueue[int]]:
    """Signals as numbers through a queue, whose `put` is safe in a handler; an event's is not."""
    heard: standard.SimpleQueue[int] = standard.SimpleQueue()
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, lambda n, _: heard.put(n)) for number in signals}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
