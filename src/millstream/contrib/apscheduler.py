"""Jobs of APScheduler 3 in a store: `MillstreamJobStore(path)`.

>>> import tempfile
>>> from apscheduler.schedulers.background import BackgroundScheduler
>>> from millstream.contrib.apscheduler import MillstreamJobStore
>>> directory = tempfile.TemporaryDirectory()
>>> stores = {"default": MillstreamJobStore(directory.name)}
>>> scheduler = BackgroundScheduler(jobstores=stores)
>>> scheduler.start(paused=True)
>>> job = scheduler.add_job(print, "interval", hours=1, args=["an hour"], id="hourly")
>>> scheduler.shutdown()
>>> again = BackgroundScheduler(jobstores=stores)
>>> again.start(paused=True)
>>> [job.id for job in again.get_jobs()]
['hourly']
>>> again.shutdown()
>>> directory.cleanup()

APScheduler pickles jobs, whatever the store of them is: who can write to the store can run code in
the process of the scheduler.
"""

from __future__ import annotations

import os
import struct
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import millstream
from millstream import Compaction
from millstream.contrib import require
from millstream.contrib.results import Log
from millstream.contrib.sharing import Share

require("apscheduler", "apscheduler", (3, 10), (4,))

from apscheduler.job import Job  # noqa: E402
from apscheduler.jobstores.base import (  # noqa: E402
    BaseJobStore,
    ConflictingIdError,
    JobLookupError,
)

if TYPE_CHECKING:
    from apscheduler.schedulers.base import BaseScheduler

    from millstream.contrib.rows import Durability

__all__ = ["MillstreamJobStore"]

DUE = struct.Struct("<d")
NEVER = float("inf")
"""When a job is due that is paused."""
ANEW_SECONDS = 3600.0
"""What was not read for so long is read anew: that a job was removed may not be told any more."""


class Jobs(Log):
    """When each job is due, and the job as it is stored, by their ids; all of them in memory."""

    def __init__(self, stream: millstream.Stream) -> None:
        super().__init__(stream)
        self.rows: dict[bytes, tuple[float, bytes]] = {}
        self._read = time.monotonic()

    def _apply(self, batch: millstream.Batch) -> None:
        for key, value in zip(batch.keys, batch.values, strict=True):
            assert key is not None  # each is that of a job
            self.rows.pop(key, None)
            if value is not None:
                self.rows[key] = DUE.unpack_from(value)[0], value[DUE.size :]

    def _prune(self, first: int) -> None:
        pass  # nothing goes by its age

    def current(self) -> dict[bytes, tuple[float, bytes]]:
        """All jobs, as any process has left them."""
        now = time.monotonic()
        if now - self._read > ANEW_SECONDS:
            self.rows.clear()
            self._next = 0
        self.catch_up()
        self._read = now
        return self.rows


class MillstreamJobStore(BaseJobStore):  # type: ignore[misc]
    """A job store of APScheduler 3 over a millstream store.

    A job that cannot be read, since its function is not there any more, say, stays stored and is
    logged; other job stores remove it. One scheduler uses a job store, as everywhere in APScheduler
    3: two of them would run each job twice. Other processes may add and remove jobs by a scheduler
    that is paused; the running one sees it when it next looks, which is when a job is due.

    Durability: what a call stored survives the kill of any process. A power cut may take the last
    100 ms or so; with durability "sync" nothing.

    Args:
        path: the directory of the store, which is made where it is not there.
        namespace: the name of the compacted stream that keeps the jobs.
        durability: "process", "interval" or "sync"; default: as stored, "interval" in a new store.

    Raises: InvalidArgument, ConfigMismatch where others made the stream with other settings, and
        what `millstream.open` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "apscheduler-jobs",
        durability: Durability | None = None,
    ) -> None:
        super().__init__()
        self.namespace = namespace
        self._durability = durability
        self._share = Share(path, self, self._jobs_of)

    def _jobs_of(self, share: Share) -> Jobs:
        def make(store: millstream.Store) -> Jobs:
            options: dict[str, Any] = {"compact": Compaction(), "segment_bytes": "1MiB"}
            durability = self._durability
            return Jobs(
                store.stream(self.namespace, partitions=1, durability=durability, **options)
            )

        return share.keep(("jobs", self.namespace, self._durability), make)

    def start(self, scheduler: BaseScheduler, alias: str) -> None:
        """Begin; also again, after `shutdown`."""
        super().start(scheduler, alias)
        self._share.begin()

    def shutdown(self) -> None:
        """Close the store, where nothing else of this process uses it."""
        self._share.end()

    # --- reading ----------------------------------------------------------------------------------

    def _rows(self) -> dict[bytes, tuple[float, bytes]]:
        return self._jobs_of(self._share).current()

    def _job(self, state: bytes) -> Any:
        job = Job.__new__(Job)
        job.__setstate__(millstream.codecs.pickle.decode(state))
        job._scheduler, job._jobstore_alias = self._scheduler, self._alias
        return job

    def _all(self, until: float) -> list[Any]:
        """Jobs that are due by a time, in the order of theirs."""
        found = []
        for key, (due, state) in sorted(self._rows().items(), key=lambda one: one[1][0]):
            if due > until:
                break
            try:
                found.append(self._job(state))
            except Exception:  # whatever a class of a user raises when it is unpickled
                self._logger.exception("job %r cannot be read; it stays stored", key.decode())
        return found

    def lookup_job(self, job_id: str) -> Any:
        """A job; None: there is none of that id."""
        row = self._rows().get(job_id.encode())
        return None if row is None else self._job(row[1])

    def get_due_jobs(self, now: datetime) -> list[Any]:
        """Jobs that are due, the earliest first; none after `shutdown`, where it is asked late."""
        return [] if self._share.ended else self._all(now.timestamp())

    def get_next_run_time(self) -> datetime | None:
        """When the next job is due; None: none is."""
        rows = {} if self._share.ended else self._rows()
        due = min((due for due, _ in rows.values()), default=NEVER)
        return None if due == NEVER else datetime.fromtimestamp(due, UTC)

    def get_all_jobs(self) -> list[Any]:
        """All jobs, the earliest first, and those last that are paused."""
        return self._all(NEVER)

    # --- changing ---------------------------------------------------------------------------------

    def _set(self, job: Any) -> None:
        due = NEVER if job.next_run_time is None else job.next_run_time.timestamp()
        state = millstream.codecs.pickle.encode(job.__getstate__())
        stream = self._jobs_of(self._share).stream
        stream.append(DUE.pack(due) + state, key=job.id.encode())

    def _require(self, job_id: str) -> None:
        if job_id.encode() not in self._rows():
            raise JobLookupError(job_id)

    def add_job(self, job: Any) -> None:
        """Store a job. Raises ConflictingIdError where there is one of its id."""
        if job.id.encode() in self._rows():
            raise ConflictingIdError(job.id)
        self._set(job)

    def update_job(self, job: Any) -> None:
        """Store a job in the place of the one of its id. Raises JobLookupError."""
        self._require(job.id)
        self._set(job)

    def remove_job(self, job_id: str) -> None:
        """Remove a job. Raises JobLookupError."""
        self._require(job_id)
        self._jobs_of(self._share).stream.append(None, key=job_id.encode())

    def remove_all_jobs(self) -> None:
        """Remove all jobs."""
        for key in list(self._rows()):
            self._jobs_of(self._share).stream.append(None, key=key)
