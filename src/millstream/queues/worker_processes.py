"""Worker processes: loops in interpreters of their own, and what parent and child tell each other.

A child is a new interpreter that unpickles queue, codec and function, says that it is ready, and
then reports what was done, as lines of JSON over a socket; the parent tells it when to stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from millstream import _native
from millstream.errors import Reentered, WorkerError
from millstream.queues.loops import LOG, SLICE_SECONDS, Counts, Loop, Options

if TYPE_CHECKING:
    import socket
    from multiprocessing.connection import Connection

    from millstream.queues.queue import Queue

BACKOFF_SECONDS = (0.1, 30.0)
"""How long until a worker process that ended is replaced: at first, and at most."""
START_TRIES = 4
"""How many worker processes in a row may end before they can take a message."""
TRACEBACK_MOST = 20_000
NOTICE_SECONDS = (5.0, 300.0)
"""When one says what is waited for, a queue or a child that starts: first, and how often at least.
"""
EXIT_SECONDS = 5.0
"""How long a worker process may take to give back what it has."""
WITHIN_SECONDS = 0.5
"""The same, and until Reentered, in a signal handler: they may wait for the call under it."""
EXIT_OVERDUE = 75
"""Exit status of a worker process whose function did not return in time."""


class Ended(NamedTuple):
    """How a worker process came to its end.

    Attributes:
        ready: had it begun to take messages?
        why: in words.
        kind: the type of the exception that ended it; "": it left none.
        message: its text.
        traceback: where it came from.
    """

    ready: bool
    why: str
    kind: str = ""
    message: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.why}: {self.kind}: {self.message}" if self.kind else self.why


class Processes:
    """Loops in processes of their own, each watched by a thread that replaces it when it dies.

    They are new interpreters, whatever start method multiprocessing has here: a fork would share
    what may not be shared. Where `START_TRIES` in a row end before they can take a message, and no
    other is at work, `error` says what the last one said, and the others are told to stop.
    """

    def __init__(self, queue: Queue, function: Callable[[Any], object], options: Options) -> None:
        self._name = queue.name
        self._path = queue.path
        self._parcel = parcel(queue, function, options)
        self._count = options.concurrency
        self._stopping = _native.Flag()
        self._grace = 0.0
        self._asked_at = float("inf")
        self._lock = _native.Lock(f"{queue.path}: its worker processes", reentrant=True)
        self._counts = Counts()
        self._children: dict[int, Child] = {}
        self._begun: set[int] = set()
        self.begun = _native.Flag()
        """All have begun to take messages, or they cannot, or are told to stop."""
        self.error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._supervise, args=(number,), daemon=True)
            for number in range(options.concurrency)
        ]

    @property
    def counts(self) -> Counts:
        """What was done until now; of a child that was killed, up to its last report."""
        with self._lock:
            return self._counts

    @property
    def held(self) -> int:
        """How many messages they work on."""
        with self._lock:
            return sum(child.held for child in self._children.values())

    @property
    def alive(self) -> bool:
        """Does any still run?"""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def pids(self) -> list[int]:
        """Process ids of those that run now."""
        with self._lock:
            return [child.process.pid for child in self._children.values()]

    def _supervise(self, number: int) -> None:
        backoff = BACKOFF_SECONDS[0]
        failed = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                ended = self._run_one(number)
            except Exception as error:  # no process, no descriptor: it may pass
                ended = Ended(False, "it was not made", type(error).__name__, str(error))
            if self._stopping.is_set():
                return
            if time.monotonic() - began > BACKOFF_SECONDS[1]:
                backoff = BACKOFF_SECONDS[0]
            failed = 0 if ended.ready else failed + 1
            with self._lock:
                working = any(child.ready for child in self._children.values())
            if failed >= START_TRIES and not working:
                self._give_up(cannot_start(self._path, failed, ended))
                return
            LOG.warning("%s: a worker process ended: %s; next in %g s", self._name, ended, backoff)
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, BACKOFF_SECONDS[1])

    def _give_up(self, error: BaseException) -> None:
        self.error = self.error or error
        LOG.error("%s", error)
        self.ask(0.0)

    def _run_one(self, number: int) -> Ended:
        """Run a child until it ends."""
        child = Child(self._parcel)
        with self._lock:
            self._children[number] = child
            late = self._stopping.is_set()
        if late:
            child.tell(self._grace)
        try:
            self._await_word(child)
            for word, said in child.heard():
                with self._lock:
                    if word == "counts":
                        self._counts += Counts(*said)
                    elif word == "held":
                        child.held = said
                    elif word == "error":
                        child.said = said
                    else:
                        child.ready = True
                        self._begun.add(number)
                        if len(self._begun) == self._count:
                            self.begun.set()
        finally:
            code = child.end()
            with self._lock:
                del self._children[number]
        why = f"exit code {code}" if code >= 0 else f"signal {-code}"
        return Ended(child.ready, why, *child.said)

    def _await_word(self, child: Child) -> None:
        """Wait until a child says or ends something; name one that takes its time over it."""
        began = time.monotonic()
        pause = NOTICE_SECONDS[0]
        while not child.speaks(pause):
            if not self._stopping.is_set():
                LOG.warning(
                    "%s: worker process %d has not begun to take messages for %.3g s; it imports"
                    " the main module and the function's, and unpickles the codec: see what of"
                    " these waits",
                    self._name, child.process.pid, time.monotonic() - began,
                )  # fmt: skip
            pause = min(2 * pause, NOTICE_SECONDS[1])

    @property
    def not_begun(self) -> str:
        """Which children have not begun to take messages, in words; "": none."""
        with self._lock:
            pids = [str(one.process.pid) for one in self._children.values() if not one.ready]
            count = len(self._children)
        verb = "has" if len(pids) == 1 else "have"
        named = f"{len(pids)} of {count} {verb} not begun to take messages: {', '.join(pids)}"
        return f"of its worker processes {named}" if pids else ""

    def ask(self, grace: float) -> None:
        """Take nothing more; give back after `grace` seconds what is still worked on."""
        with self._lock:
            self._grace = grace
            self._asked_at = min(self._asked_at, time.monotonic())
            self._stopping.set()
            children = list(self._children.values())
        self.begun.set()
        for child in children:
            child.tell(grace)

    def check(self) -> None:
        """They were not started where they might wait for this thread."""

    def await_end(self) -> None:
        """Wait a moment; Reentered where they may wait for what this thread holds."""
        time.sleep(0.005)
        held = _native.held()
        if held and time.monotonic() - self._asked_at > WITHIN_SECONDS:
            raise Reentered(
                f"{self._path}: its worker processes take nothing more, but did not end yet, and"
                f" may wait for the call under this one, which has: {', '.join(held)}. Stop them"
                " again when it has returned"
            )

    def end(self) -> None:
        """Wait a moment for the children to give back what they have, then kill the rest."""
        self.ask(0.0)
        deadline = time.monotonic() + (WITHIN_SECONDS if _native.held() else EXIT_SECONDS)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for child in self._children.values():
                child.process.kill()  # its leases end with it
        for thread in self._threads:
            thread.join(EXIT_SECONDS)


def parcel(queue: Queue, function: Callable[[Any], object], options: Options) -> bytes:
    """What a child needs, as bytes; raises where there can be no child, or nothing can be sent."""
    with _native.loading:
        from multiprocessing import process
        from multiprocessing.reduction import ForkingPickler

    why = None
    if getattr(process.current_process(), "_inheriting", False):
        why = (
            "this is one, and imports the main module, which starts workers again; put what runs"
            ' them below `if __name__ == "__main__":`'
        )
    elif process.current_process().daemon:
        why = (
            "this process is a daemonic one of multiprocessing, which may have no children; start"
            ' it with daemon=False, or use mode="thread"'
        )
    if why is not None:
        raise WorkerError(f"{queue.path}: worker processes cannot start: {why}")
    try:
        return bytes(ForkingPickler.dumps((queue, function, options)))
    except Exception as error:  # whatever a codec of a user raises
        raise WorkerError(
            f"{queue.path}: worker processes cannot start: queue, codec and function are sent to"
            f" them, and one does not pickle: {type(error).__name__}: {error}",
            kind=type(error).__name__,
        ) from error


def cannot_start(path: str, tries: int, ended: Ended) -> WorkerError:
    """What is raised when it was tried often enough."""
    error = WorkerError(
        f"{path}: worker processes cannot start: {tries} in a row ended before they could take a"
        f" message, the last with {ended}",
        kind=ended.kind,
        traceback=ended.traceback,
    )
    if ended.traceback:
        error.add_note(f"In the worker process:\n\n{ended.traceback}")
    return error


BOOT = (
    "import sys; from multiprocessing.connection import Connection as C; c = C(int(sys.argv[1])); "
    "sys.path[:] = c.recv(); from millstream.queues.worker_processes import main; main(c)"
)
"""What a child runs: as multiprocessing's spawn, but its main module is imported where we hear of
it when that fails."""


class Child:
    """A worker process, as its parent has it."""

    def __init__(self, parcel: bytes) -> None:
        with _native.loading:
            import socket
            import subprocess
            from multiprocessing import spawn, util
            from multiprocessing.reduction import ForkingPickler

        self.ready = False
        self.held = 0
        self.said: Sequence[str] = ()
        flags: list[str] = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
        preparation = spawn.get_preparation_data("millstream worker")
        # It pickles for multiprocessing's own children only; these are as near.
        preparation["authkey"] = bytes(preparation["authkey"])
        self._socket, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            try:
                self.process = subprocess.Popen(
                    [os.fsdecode(spawn.get_executable()), *flags, "-c", BOOT, str(number)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(number,),
                )
            except BaseException:
                self._socket.close()
                raise
        with contextlib.suppress(OSError):  # it is gone: `heard` ends at once
            for sent in (ForkingPickler.dumps(sys.path), ForkingPickler.dumps(preparation), parcel):
                # As Connection.recv reads it.
                self._socket.sendall(len(sent).to_bytes(4, "big") + bytes(sent))

    def speaks(self, seconds: float) -> bool:
        """Wait until it says something, or is gone; False: it did neither in so long."""
        with _native.loading:
            import select
        ear = select.poll()
        ear.register(self._socket, select.POLLIN)
        return bool(ear.poll(seconds * 1000))

    def heard(self) -> Iterator[tuple[str, Any]]:
        """What it says, until it is gone."""
        with _native.loading:
            import json

        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else it died over it
                    yield from json.loads(line).items()

    def tell(self, grace: float) -> None:
        """Tell it to stop, unless it is gone."""
        with contextlib.suppress(OSError):
            self._socket.sendall(b"%r\n" % grace)

    def end(self) -> int:
        """Wait for its end; its exit code."""
        code = self.process.wait()
        self._socket.close()
        return code


def main(connection: Connection[Any, Any]) -> None:
    """The main function of a worker process."""
    with _native.loading:
        import socket
        from multiprocessing import process, spawn

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent hears it too
    os.set_inheritable(connection.fileno(), False)
    number = os.dup(connection.fileno())  # read as a socket from here on
    try:
        process.current_process()._inheriting = True  # type: ignore[attr-defined]
        spawn.prepare(connection.recv())
        queue, function, options = connection.recv()
        del process.current_process()._inheriting  # type: ignore[attr-defined]
        connection.close()
        loop = Loop(queue, function, options)
    except BaseException as error:
        with socket.socket(fileno=number) as channel:
            Reports(channel, None).fail(error)
        raise
    signal.signal(signal.SIGTERM, lambda *_: loop.stopping.set())
    reports = Reports(socket.socket(fileno=number), loop)
    reports.send({"ready": True})
    threading.Thread(target=reports.run, daemon=True).start()
    loop.run()
    reports.report()
    if loop.error is not None:
        reports.fail(loop.error)
        raise loop.error


class Reports:
    """What a worker process tells its parent, and hears from it: lines of JSON."""

    def __init__(self, channel: socket.socket, loop: Loop | None) -> None:
        self._channel = channel
        self._loop = loop
        self._sent = Counts()
        self._held = 0
        self._lock = _native.Lock("the reports of a worker process")

    def send(self, said: dict[str, Any]) -> None:
        """Tell something, unless the parent is dead."""
        with _native.loading:
            import json
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(said).encode() + b"\n")

    def fail(self, error: BaseException) -> None:
        """Tell what ends this process."""
        with _native.loading:
            import traceback
        text = "".join(traceback.format_exception(error))[-TRACEBACK_MOST:]
        self.send({"error": [type(error).__name__, str(error)[:TRACEBACK_MOST], text]})

    def report(self) -> None:
        """Tell what was done since the last time."""
        assert self._loop is not None
        with self._lock:
            counts, held = self._loop.counts, len(self._loop.held)
            new = [now - before for now, before in zip(counts, self._sent, strict=True)]
            if any(new) or held != self._held:
                self.send({"counts": new, "held": held})
                self._sent, self._held = counts, held

    def run(self) -> None:
        """Report, listen, and end the process when time is up."""
        with _native.loading:
            import select
        loop = self._loop
        assert loop is not None
        deadline = float("inf")
        heard = True
        ear = select.poll()
        ear.register(self._channel, select.POLLIN)
        while True:
            most = min(SLICE_SECONDS, max(0.0, deadline - time.monotonic()))
            if not heard:
                time.sleep(SLICE_SECONDS)
            elif ear.poll(most * 1000):
                try:
                    said = self._channel.recv(4096)
                except OSError:
                    said = b""
                if said:
                    deadline = time.monotonic() + float(said.split()[-1])
                heard = said != b""  # else the parent is dead
                loop.stopping.set()
            self.report()
            begun = loop.begun
            if begun is not None and time.monotonic() - begun > loop.options.time_limit:
                loop.fail_overdue()
            elif time.monotonic() < deadline:
                continue
            else:
                loop.release()
            self.report()
            os._exit(EXIT_OVERDUE)  # the function may never return
