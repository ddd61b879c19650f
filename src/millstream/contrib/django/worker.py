"""The worker: takes tasks, runs them, and takes them off together with their results."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from traceback import format_exception
from typing import TYPE_CHECKING, Any

from django.db import close_old_connections, connections
from django.utils import timezone

from millstream import Aborted, Closed, MillstreamError, WorkerError
from millstream.contrib.django.backend import (
    base,
    check_size,
    dumps,
    loads,
    normalize_json,
    task_finished,
    task_started,
)
from millstream.contrib.lanes import take
from millstream.contrib.renewal import AGAIN_SECONDS_MAX, Renewal
from millstream.contrib.results import FINAL, OTHER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from millstream import Message
    from millstream.contrib.django.backend import MillstreamBackend
    from millstream.contrib.lanes import Lanes

__all__ = ["LOGGER", "Worker"]

LOGGER = logging.getLogger("millstream.django")
TURN_SECONDS = 0.25
"""So often an idle worker looks whether it is to stop, and for queues that are new."""
STOPS = (signal.SIGTERM, signal.SIGINT)
READY, RUNNING, FAILED, SUCCESSFUL = (
    base.TaskResultStatus[name] for name in ("READY", "RUNNING", "FAILED", "SUCCESSFUL")
)


class Worker:
    """Runs the tasks of a backend.

    Args:
        backend: whose tasks.
        queues: names of their queues; None: all that were ever used.
        worker_id: what results name.
        threads: how many tasks at once. With 1 they run in the thread that calls `run`.
        batch: `run` returns when no task is ready.
        max_tasks: it returns when so many were run.
        grace: seconds for which tasks in hand may run on after a signal.
    """

    def __init__(
        self,
        backend: MillstreamBackend,
        queues: list[str] | None,
        *,
        worker_id: str,
        threads: int = 1,
        batch: bool = False,
        max_tasks: int | None = None,
        grace: float = 30.0,
    ) -> None:
        self._backend, self._queues, self._opened = backend, queues, backend.opened()
        self._worker_id, self._threads, self._batch, self._grace = worker_id, threads, batch, grace
        self._permits = None if max_tasks is None else threading.Semaphore(max_tasks)
        self._renewal = Renewal(self._opened.lease)
        self._held: dict[int, Message] = {}
        self._give_up_at: float | None = None
        self._over = threading.Event()
        self._ear: int | None = None
        self._mouth: int | None = None
        self._looked = -TURN_SECONDS
        self._lanes: list[Lanes] = []

    def run(self) -> None:
        """Run tasks until a signal comes, or what was asked for is done."""
        watch = threading.Thread(target=self._watch, daemon=True, name="millstream-watch")
        with self._hearing():
            try:
                watch.start()
                if self._threads == 1:
                    self._loop()
                else:
                    self._run_threads()
            finally:
                self._over.set()
                if self._mouth is not None:
                    os.write(self._mouth, b"\0")  # no signal: it wakes the thread
                watch.join()
                self._renewal.end()

    def _run_threads(self) -> None:
        names = [f"millstream-task-{number}" for number in range(self._threads)]
        threads = [
            threading.Thread(target=self._loop_and_close, daemon=True, name=name) for name in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # in turns, so that signals are heard
                thread.join(TURN_SECONDS)

    def _loop_and_close(self) -> None:
        try:
            self._loop()
        finally:
            connections.close_all()  # those of this thread

    # --- ending -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        """Have signals told to the thread that watches, and not to the task that is under way.

        A handler in Python runs in the main thread alone, which a task may hold in a call of the
        system, and which a second signal does not wake while a first one waits for it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._ear, self._mouth = ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = {number: signal.getsignal(number) for number in STOPS}
        told = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        try:
            for number in STOPS:
                signal.signal(number, lambda *_: None)
            yield
        finally:
            signal.set_wakeup_fd(told)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(ear)
            os.close(mouth)

    def _watch(self) -> None:
        """After one signal take nothing more; with a second one, or late, give back."""
        while not self._over.is_set():
            if self._ear is None:
                self._over.wait(TURN_SECONDS)
            elif select.select([self._ear], [], [], TURN_SECONDS)[0]:
                for number in os.read(self._ear, 100):
                    if number in STOPS and self._give_up_at is not None:
                        self._give_up()
                    elif number in STOPS:
                        self._give_up_at = time.monotonic() + self._grace
            if self._give_up_at is not None and time.monotonic() >= self._give_up_at:
                self._give_up()

    def _give_up(self) -> None:
        """Give back the tasks in hand, uncounted, and exit: nothing else stops a thread."""
        for message in list(self._held.values()):
            try:
                message.release()
                LOGGER.warning("%s is given back, since the worker ends", _name(message))
            except MillstreamError as error:  # it comes back when this process is gone
                LOGGER.warning("%s: %s", _name(message), error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    # --- taking -----------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._give_up_at is None:
            if self._permits is not None and not self._permits.acquire(blocking=False):
                return
            try:
                message = self._take()
            except Closed as error:
                LOGGER.error("worker %s ends: %s", self._worker_id, error)
                return
            if message is not None:
                self._hold(message)
                continue
            if self._permits is not None:
                self._permits.release()
            if self._batch:
                return

    def _take(self) -> Message | None:
        if time.monotonic() - self._looked >= TURN_SECONDS:
            self._looked = time.monotonic()
            names = self._opened.queues() if self._queues is None else self._queues
            self._lanes = [self._opened.lanes(name) for name in names]
        self._lanes = self._lanes[1:] + self._lanes[:1]  # none waits for ever for another
        if self._lanes:
            return take(self._lanes, 0.0 if self._batch else TURN_SECONDS)
        if not self._batch:
            self._over.wait(TURN_SECONDS)
        return None

    def _hold(self, message: Message) -> None:
        self._held[id(message)] = message
        self._renewal.begin(message)
        close_old_connections()
        try:
            self._work(message)
        except Aborted:
            LOGGER.warning("%s: another worker has it by now", _name(message))
        except Exception:  # not the task's: what became of it could not be kept
            delay = min(2.0 ** (message.attempt - 1), AGAIN_SECONDS_MAX)
            LOGGER.exception("%s: runs again in %g s", _name(message), delay)
            if not message.finished:
                message.nack(delay=delay, reason="its result could not be stored")
        finally:
            self._renewal.leave(message)
            self._held.pop(id(message), None)
            close_old_connections()

    # --- running ----------------------------------------------------------------------------------

    def _work(self, message: Message) -> None:
        try:
            result = loads(self._latest(message))
        except Exception as error:  # whatever the import of a user's module raises
            self._refuse(message, error)
            return
        if message.attempt > self._backend.settings["max_attempts"]:
            self._fail(message, result)
            return
        now = timezone.now()
        first = result.started_at or now
        _set(result, status=RUNNING, started_at=first, last_attempted_at=now, finished_at=None)
        result.worker_ids.append(self._worker_id)
        self._opened.results.set(result.id.encode(), dumps(result))
        try:
            task_started.send(sender=type(self._backend), task_result=result)
            context = [base.TaskContext(task_result=result)] if result.task.takes_context else []
            value = normalize_json(result.task.call(*context, *result.args, **result.kwargs))
            _set(result, _return_value=value)
            check_size(result)
        except BaseException as error:  # also SystemExit, which ends the task alone
            result.errors.append(_described(error))
            _set(result, _return_value=None)
            self._end(message, result, FAILED)
        else:
            self._end(message, result, SUCCESSFUL)

    def _latest(self, message: Message) -> bytes:
        """What is known of a task: of one that was run before that is its last result."""
        data: bytes = message.data
        if message.attempt > 1:
            return self._opened.results.get(json.loads(data)["id"].encode()) or data
        return data

    def _end(self, message: Message, result: Any, status: Any) -> None:
        """Store the result and take the task off its queue: both, or nothing."""
        _set(result, status=status, finished_at=timezone.now())
        mark = FINAL if status == SUCCESSFUL else OTHER
        results = self._opened.results
        with self._opened.transaction() as transaction:
            transaction.append(results.stream, mark + dumps(result), key=result.id.encode())
            transaction.ack(message)
        self._say(result)

    def _say(self, result: Any) -> None:
        try:
            task_finished.send(sender=type(self._backend), task_result=result)
        except Exception:
            LOGGER.exception("task %s: a receiver of task_finished failed", result.id)

    def _fail(self, message: Message, result: Any) -> None:
        """A task that its worker did not outlive so often is not run again."""
        text = f"its worker was killed or stopped {message.attempt - 1} times while it ran"
        result.errors.append(_described(WorkerError(text)))
        _set(result, status=FAILED, finished_at=timezone.now())
        self._opened.results.set(result.id.encode(), dumps(result))
        message.reject(text)
        LOGGER.error("%s: dead letter: %s", _name(message), text)
        self._say(result)

    def _refuse(self, message: Message, error: Exception) -> None:
        """What this program cannot run is a dead letter, for a program that can."""
        LOGGER.error("%s: dead letter", _name(message), exc_info=error)
        with contextlib.suppress(ValueError, KeyError, TypeError):  # nothing of ours
            record = json.loads(message.data)
            described = _described(error)
            record["errors"].append([described.exception_class_path, described.traceback])
            record.update(status=FAILED.value, finished_at=timezone.now().isoformat())
            self._opened.results.set(record["id"].encode(), json.dumps(record).encode())
        message.reject(repr(error))


def _name(message: Message) -> str:
    return f"{message.queue.name}: message {message.id}, attempt {message.attempt}"


def _set(result: Any, **fields: Any) -> None:
    for name, value in fields.items():
        object.__setattr__(result, name, value)


def _described(error: BaseException) -> Any:
    kind = type(error)
    path = f"{kind.__module__}.{kind.__qualname__}"
    return base.TaskError(exception_class_path=path, traceback="".join(format_exception(error)))
