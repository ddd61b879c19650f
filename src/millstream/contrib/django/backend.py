"""The backend: tasks are messages of queues, their results records of a stream."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import millstream
from millstream import LimitExceeded, MillstreamError, RetryPolicy
from millstream.contrib import require
from millstream.contrib.lanes import Lanes
from millstream.contrib.results import Results
from millstream.contrib.sharing import PUT_SECONDS, SharedStore

require("django", "django", (5, 2), (7,))

import django  # noqa: E402
from django.core.exceptions import SuspiciousOperation  # noqa: E402
from django.db import connections  # noqa: E402
from django.utils import timezone  # noqa: E402
from django.utils.crypto import get_random_string  # noqa: E402
from django.utils.module_loading import import_string  # noqa: E402

if django.VERSION >= (6, 0):
    from django.tasks import DEFAULT_TASK_BACKEND_ALIAS, base, exceptions, task_backends
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.signals import logger as LOGGER_OF_TASKS
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
else:
    require("django-tasks", "django", (0, 9), (1,))
    from django_tasks import DEFAULT_TASK_BACKEND_ALIAS, base, exceptions, task_backends
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.signals import logger as LOGGER_OF_TASKS
    from django_tasks.signals import task_enqueued, task_finished, task_started
    from django_tasks.utils import normalize_json

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEFAULT_TASK_BACKEND_ALIAS",
    "LOGGER_OF_TASKS",
    "NAME",
    "MillstreamBackend",
    "base",
    "normalize_json",
    "task_backends",
    "task_finished",
    "task_started",
]

# django-tasks calls two of them otherwise than Django 6 and its own later versions do.
InvalidTask = getattr(exceptions, "InvalidTask", None) or exceptions.InvalidTaskError
InvalidTaskBackend = (
    getattr(exceptions, "InvalidTaskBackend", None) or exceptions.InvalidTaskBackendError
)
OPTIONS: dict[str, Any] = {
    "path": (str, os.PathLike),
    "durability": str,
    "capacity": int,
    "lease": (int, float),
    "max_attempts": int,
    "result_ttl": (int, float),
}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,49}")
BLOCKS_MAX = 25
"""Priorities are -100 to 100: there are no more ranges of 8 than these, and 0 to 7."""
TASK_MAX = 16 << 20
ATTEMPTS_MAX = 61
TIMES = ("enqueued_at", "started_at", "finished_at", "last_attempted_at")


class Opened:
    """What one process has open for one backend."""

    def __init__(self, store: millstream.Store, backend: MillstreamBackend) -> None:
        options = backend.settings
        self.store = store
        self._alias = backend.alias
        self.lease = float(options["lease"])
        self._settings: dict[str, Any] = {
            "capacity": options["capacity"],
            "lease": self.lease,
            # One attempt more: the worker that gets it says of the task that it failed.
            "retry": RetryPolicy(max_attempts=options["max_attempts"] + 1, backoff=0.0),
            "payload_max": TASK_MAX,
        }
        ttl = float(options["result_ttl"])
        self.results = Results(store, f"django.{self._alias}", ttl)
        self._lanes: dict[str, Lanes] = {}
        for name in backend.queues:
            self.lanes(name)

    def lanes(self, queue: str) -> Lanes:
        """The queue of that name, which is made where it is not there."""
        found = self._lanes.get(queue)
        if found is None:
            name = f"{self._alias}.{queue}"
            found = Lanes(self.store, "django", name, BLOCKS_MAX, self._settings)
            self._lanes[queue] = found
        return found

    def transaction(self) -> millstream.Transaction:
        """A transaction that survives what a put survives."""
        level: Any = "sync" if self.store.durability == "sync" else "process"
        return self.store.transaction(durability=level)

    def queues(self) -> list[str]:
        """The names of all queues that were used."""
        begin = f"django.{self._alias}."
        return [name[len(begin) :] for name in self.store.queues() if name.startswith(begin)]


class MillstreamBackend(BaseTaskBackend):  # type: ignore[misc]
    """A backend of Django's tasks in a millstream store.

    Tasks of the queue NAME are messages of the queue ``django.<alias>.<name>``, those of priorities
    outside of 0 to 7 of further ones; results are in the stream ``django.<alias>``. Thread-safe; a
    forked process opens the store again at its first call.

    In a transaction of a database, `enqueue` waits for the commit, as `on_commit` does; after a
    rollback there is no such task. With several databases it waits for all whose transactions are
    under way.

    Durability: what a call stored survives the kill of any process when it returns. A power cut may
    take the last 100 ms or so; with durability "sync" nothing.

    In TASKS, beside BACKEND and QUEUES, ``ENQUEUE_ON_COMMIT`` (default True; False: `enqueue` does
    not wait for the commit), and OPTIONS:

    - path: the directory of the store, which is made where it is not there.
    - durability: "process", "interval" or "sync"; default: as stored, "interval" in a new store.
    - capacity: how many tasks of a queue may wait or run; more make `enqueue` wait up to 10 s and
      raise `QueueFull`. Default 100,000.
    - lease: seconds after which another worker gets the task of one that was stopped, default 60.
      One that is killed is noticed within 100 ms.
    - max_attempts: a task that its worker did not outlive so often is FAILED and a dead letter.
      Default 12, at most 61.
    - result_ttl: seconds for which a result is kept, default 7 days.

    Raises: InvalidTaskBackend where an option, the name of a queue or the store is wrong.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self.settings: dict[str, Any] = {
            "durability": None,
            "capacity": 100_000,
            "lease": 60.0,
            "max_attempts": 12,
            "result_ttl": 7 * 86400.0,
            **self.options,
        }
        self._on_commit = params.get("ENQUEUE_ON_COMMIT", True)
        self._check_options()
        self._key = json.dumps([alias, sorted(self.queues), {**self.settings, "path": ""}])
        path = os.fspath(self.settings["path"])
        # Not left with this object: servers make one for each of their threads, at each request.
        self._shared = SharedStore.join(path, self.settings["durability"])
        try:
            self.opened()
        except MillstreamError as error:
            self._shared.leave()
            raise InvalidTaskBackend(f"TASKS[{alias!r}]: {error}") from error

    def _check_options(self) -> None:
        def refuse(what: str) -> None:
            raise InvalidTaskBackend(f"TASKS[{self.alias!r}]: {what}")

        if "path" not in self.options:
            refuse("say OPTIONS['path'], the directory of a store")
        for name, value in self.options.items():
            if name not in OPTIONS:
                refuse(f"OPTIONS[{name!r}] is not known; there are {', '.join(OPTIONS)}")
            if not isinstance(value, OPTIONS[name]) or isinstance(value, bool):
                refuse(f"OPTIONS[{name!r}] is {value!r}, which has the wrong type")
        if not 1 <= self.settings["max_attempts"] <= ATTEMPTS_MAX:
            refuse(f"OPTIONS['max_attempts'] must be 1 to {ATTEMPTS_MAX}")
        if not self.settings["result_ttl"] > 0:
            refuse("OPTIONS['result_ttl'] must be more than 0 seconds")
        if self._on_commit not in (True, False):
            refuse(f"ENQUEUE_ON_COMMIT is {self._on_commit!r}; expected True or False")
        for what, name in [("alias", self.alias), *(("queue", name) for name in self.queues)]:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                refuse(f"{what} {name!r}: expected 1 to 50 characters of A-Z a-z 0-9 . _ -")

    def opened(self) -> Opened:
        """The store as this process has it open, for all threads."""
        return self._shared.keep(self._key, lambda store: Opened(store, self))

    def close(self) -> None:
        """Close the store, for all threads of this process; the next call opens it again."""
        self._shared.close()

    def validate_task(self, task: Any) -> None:
        """Raise InvalidTask where Django's rules, or millstream's for names, are broken."""
        super().validate_task(task)
        if not NAME.fullmatch(task.queue_name):
            raise InvalidTask(
                f"Queue {task.queue_name!r}: expected 1 to 50 characters of A-Z a-z 0-9 . _ -"
            )

    # --- putting ----------------------------------------------------------------------------------

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Put a task into its queue, once the transaction of the database is committed.

        Raises: LimitExceeded where its arguments are too long; QueueFull.
        """
        self.validate_task(task)
        result = base.TaskResult(
            task=task,
            id=get_random_string(32),
            status=base.TaskResultStatus.READY,
            enqueued_at=None,
            started_at=None,
            finished_at=None,
            last_attempted_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )
        check_size(result)
        pending = [one for one in connections.all(initialized_only=True) if _is_in(one)]
        if self._on_commit and pending:
            when_committed(pending, partial(self._put, result))
        else:
            self._put(result)
        return result

    def _put(self, result: Any) -> None:
        opened = self.opened()
        object.__setattr__(result, "enqueued_at", timezone.now())
        data, task = dumps(result), result.task
        queue, level = opened.lanes(task.queue_name).of(task.priority)
        key = result.id.encode()
        opened.results.set(key, data)
        try:
            queue.put(data, priority=level, at=task.run_after, timeout=PUT_SECONDS)
        except BaseException:
            opened.results.set(key, None)
            raise
        task_enqueued.send(type(self), task_result=result)

    # --- results ----------------------------------------------------------------------------------

    def get_result(self, result_id: str) -> Any:
        """The result of a task, as it is now.

        Raises: TaskResultDoesNotExist; ImportError, SuspiciousOperation: there is no such task in
        this program.
        """
        data = self.opened().results.get(str(result_id).encode())
        if data is None:
            raise exceptions.TaskResultDoesNotExist(result_id)
        return loads(data)

    def wait(self, result_id: str, timeout: float | None = None) -> Any:
        """Return the result of a task when it is finished, or as it is after some seconds.

        Woken by what workers store: nobody polls.
        """
        results = self.opened().results
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            result = self.get_result(result_id)
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            if result.is_finished or left <= 0:
                return result
            results.wait(left)

    def check(self, **kwargs: Any) -> list[Any]:
        """What Django's system checks ask for: nothing is wrong that `__init__` has not refused."""
        return []


def _is_in(connection: Any) -> bool:
    """Is a transaction under way, or would one begin with the next query?"""
    if connection.in_atomic_block:
        return True
    return connection.connection is not None and not connection.get_autocommit()


def when_committed(pending: list[Any], function: Callable[[], object]) -> None:
    """Call a function when the last of some transactions is committed."""
    if not pending:
        function()
        return
    connection = pending.pop()
    connection.on_commit(partial(when_committed, pending, function))


def dumps(result: Any) -> bytes:
    """A result as JSON, which all that is to be known of the task is in."""
    task = result.task
    run_after = task.run_after
    record = {
        "id": result.id,
        "task": task.module_path,
        "priority": task.priority,
        "queue_name": task.queue_name,
        "run_after": None if run_after is None else run_after.isoformat(),
        "backend": result.backend,
        "args": result.args,
        "kwargs": result.kwargs,
        "status": str(result.status.value),
        "errors": [[one.exception_class_path, one.traceback] for one in result.errors],
        "worker_ids": result.worker_ids,
        "return_value": result._return_value,
    }
    for name in TIMES:
        moment = getattr(result, name)
        record[name] = None if moment is None else moment.isoformat()
    return json.dumps(record, separators=(",", ":")).encode()


def check_size(result: Any) -> None:
    """Raise LimitExceeded where it is too long."""
    size = len(dumps(result))
    if size > TASK_MAX:
        raise LimitExceeded(
            f"task {result.task.module_path}: as JSON it has {size:,} bytes; at most"
            f" {TASK_MAX:,} are allowed; keep large arguments and results elsewhere"
        )


def loads(data: bytes) -> Any:
    """A result from JSON. Raises ImportError, SuspiciousOperation where there is no such task."""
    record = json.loads(data)
    task = import_string(record["task"])
    if not isinstance(task, base.Task):
        raise SuspiciousOperation(
            f"Task {record['id']} does not point to a Task ({record['task']})"
        )
    moments = {name: _moment(record[name]) for name in TIMES}
    result = base.TaskResult(
        task=task.using(
            priority=record["priority"],
            queue_name=record["queue_name"],
            run_after=_moment(record["run_after"]),
            backend=record["backend"],
        ),
        id=record["id"],
        status=base.TaskResultStatus[record["status"]],
        args=record["args"],
        kwargs=record["kwargs"],
        backend=record["backend"],
        errors=[
            base.TaskError(exception_class_path=path, traceback=text)
            for path, text in record["errors"]
        ],
        worker_ids=record["worker_ids"],
        **moments,
    )
    object.__setattr__(result, "_return_value", record["return_value"])
    return result


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
