"""``manage.py millstream_worker``: run the tasks of a `MillstreamBackend`."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.utils.crypto import get_random_string

from millstream.contrib.django.backend import (
    DEFAULT_TASK_BACKEND_ALIAS,
    LOGGER_OF_TASKS,
    NAME,
    MillstreamBackend,
    task_backends,
)
from millstream.contrib.django.worker import LOGGER, Worker

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

__all__ = ["Command"]

LEVELS = {0: logging.CRITICAL, 1: logging.INFO}
ID_MAX = 64


class Command(BaseCommand):  # type: ignore[misc]
    """The command."""

    help = (
        "Run tasks of a MillstreamBackend until SIGTERM or SIGINT. Start as many of these as there"
        " is work for; if one is killed, another runs what it had in hand."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """What it can be told."""
        option = parser.add_argument
        option(
            "--queue-name",
            default=None,
            help="queues, separated by commas; '*': all that were ever used (default: those of"
            " QUEUES in the settings)",
        )
        option(
            "--backend",
            default=DEFAULT_TASK_BACKEND_ALIAS,
            dest="backend_name",
            help="alias in TASKS (default: %(default)s)",
        )
        option("--threads", type=int, default=1, help="tasks at once (default: %(default)s)")
        option("--batch", action="store_true", help="run what is ready, then exit")
        option("--max-tasks", type=int, help="exit after so many tasks")
        option("--worker-id", help="what results name (default: made up)")
        option(
            "--grace",
            type=float,
            default=30.0,
            help="seconds for which tasks may run on after a signal; then, or with a second one,"
            " they are given back (default: %(default)s)",
        )

    def handle(
        self,
        *,
        verbosity: int,
        backend_name: str,
        queue_name: str | None,
        threads: int,
        batch: bool,
        max_tasks: int | None,
        worker_id: str | None,
        grace: float,
        **options: Any,
    ) -> None:
        """Run it."""
        try:
            backend = task_backends[backend_name]
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        if not isinstance(backend, MillstreamBackend):
            raise CommandError(f"backend {backend_name!r} is no MillstreamBackend")
        if threads < 1 or grace < 0 or (max_tasks is not None and max_tasks < 0):
            raise CommandError("--threads must be 1 or more, --grace and --max-tasks 0 or more")
        worker_id = get_random_string(32) if worker_id is None else worker_id
        if not 1 <= len(worker_id) <= ID_MAX:
            raise CommandError(f"--worker-id: expected 1 to {ID_MAX} characters")
        names = queue_name.split(",") if queue_name else sorted(backend.queues)
        if not names or "*" in names:
            names = []
        for name in names:
            if not NAME.fullmatch(name):
                raise CommandError(
                    f"--queue-name: queue {name!r}: expected 1 to 50 characters of"
                    " A-Z a-z 0-9 . _ -"
                )
            if backend.queues and name not in backend.queues:
                raise CommandError(
                    f"queue {name!r} is not one of backend {backend_name!r}; there are"
                    f" {', '.join(sorted(backend.queues))}"
                )
        worker = Worker(
            backend,
            names or None,
            worker_id=worker_id,
            threads=threads,
            batch=batch,
            max_tasks=max_tasks,
            grace=grace,
        )
        with self._logging(verbosity):
            LOGGER.info("worker %s begins: queues %s", worker_id, ", ".join(names) or "*")
            worker.run()
            LOGGER.info("worker %s ends", worker_id)

    @contextlib.contextmanager
    def _logging(self, verbosity: int) -> Iterator[None]:
        handler = logging.StreamHandler(self.stdout)
        mute = []
        for logger in (LOGGER, LOGGER_OF_TASKS):
            logger.setLevel(LEVELS.get(verbosity, logging.DEBUG))
            if not logger.hasHandlers():  # or nothing would show
                logger.addHandler(handler)
                mute.append(logger)
        try:
            yield
        finally:
            for logger in mute:
                logger.removeHandler(handler)
