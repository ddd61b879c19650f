"""taskiq without a server: `MillstreamBroker(path)` in the place of a broker for Redis.

>>> import asyncio, tempfile
>>> from taskiq import api
>>> from millstream.contrib.taskiq import MillstreamBroker, MillstreamResultBackend
>>> async def main(directory):
...     broker = MillstreamBroker(directory)
...     broker = broker.with_result_backend(MillstreamResultBackend(directory))
...     @broker.task
...     async def add(x: int, y: int) -> int:
...         return x + y
...     await broker.startup()
...     running = asyncio.create_task(api.run_receiver_task(broker))  # or: taskiq worker
...     sent = await add.kiq(1, 2)
...     print((await sent.wait_result(timeout=30)).return_value)
...     running.cancel()
...     await asyncio.wait([running])
...     await broker.shutdown()
>>> with tempfile.TemporaryDirectory() as directory:
...     asyncio.run(main(directory))
3

A task is leased to the worker that has fetched it, and is off the queue when it is acknowledged: if
the worker is killed, another gets it, within about 100 ms. One with a label `delay` waits in the
store, in no worker's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, TypeVar

import millstream
from millstream import (
    Compaction,
    InvalidArgument,
    LeaseLost,
    MillstreamError,
    RetryPolicy,
)
from millstream.contrib import require
from millstream.contrib.renewal import Renewal
from millstream.contrib.rows import Rows
from millstream.contrib.sharing import (
    AGAIN_SECONDS,
    LANES,
    PUT_SECONDS,
    Share,
    lane_of,
)

require("taskiq", "taskiq", (0, 13), (0, 14))

from taskiq import (  # noqa: E402
    AckableMessage,
    AsyncBroker,
    AsyncResultBackend,
    BrokerMessage,
    ScheduledTask,
    ScheduleSource,
    TaskiqResult,
)
from taskiq.depends.progress_tracker import TaskProgress  # noqa: E402
from taskiq.exceptions import ResultGetError  # noqa: E402
from taskiq.serializers import JSONSerializer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from taskiq.abc.serializer import TaskiqSerializer

    from millstream.contrib.rows import Durability

__all__ = ["MillstreamBroker", "MillstreamResultBackend", "MillstreamScheduleSource"]

logger = logging.getLogger(__name__)
Outcome = TypeVar("Outcome")


async def _call(durability: str, function: Callable[[], Outcome]) -> Outcome:
    """Call what appends: a sync may take long, and then the loop goes on meanwhile."""
    return await asyncio.to_thread(function) if durability == "sync" else function()


class Acknowledgement:
    """Ends the lease of a message when taskiq calls it; without that it is given back.

    taskiq has no word for what failed on its way: it lets go of the message, at the latest when it
    has the next one.
    """

    def __init__(self, broker: MillstreamBroker, lease: millstream.Message) -> None:
        self._broker = broker
        self._lease = lease
        broker.renewal.begin(lease)

    async def __call__(self) -> None:
        """Take the task off the queue."""
        self._broker.renewal.leave(self._lease)
        try:
            await _call(self._lease.queue.durability, self._lease.ack)
        except LeaseLost as error:
            logger.warning("%s; it is delivered again", error)

    def __del__(self) -> None:
        if self._lease.finished:
            return
        self._broker.renewal.leave(self._lease)
        with contextlib.suppress(MillstreamError):
            if self._broker.listening:
                logger.error("%r was not acknowledged; it is delivered again", self._lease)
                self._lease.nack(delay=AGAIN_SECONDS, reason="not acknowledged")
            else:  # it was not begun
                self._lease.release()


class MillstreamBroker(AsyncBroker):  # type: ignore[misc]
    """A broker of taskiq over a millstream store: ``MillstreamBroker("/var/lib/app")``.

    Labels of a task that it honours: ``delay``, in seconds; ``priority``, 0 to 9, 9 the most
    urgent, in eight steps (4 and 5 share one, as do 8 and 9); ``queue_name``, of another queue than
    the broker's. A forked process opens the store again at its first call.

    Durability: what was sent survives the kill of any process when `kiq` returns. A power cut may
    take the last 100 ms or so; with durability "sync" nothing.

    Args:
        path: the directory of the store, which is made where it is not there.
        queue_name: the name of the store's queue that workers listen to.
        durability: "process", "interval" or "sync"; default: as stored, "interval" in a new store.
        capacity: how many tasks of a queue may wait or run; more make `kiq` wait up to 10 s and
            raise. Default 100,000.
        lease: seconds after which another worker gets the tasks of one that was stopped. One that
            is killed is noticed within 100 ms.
        max_attempts: a task that its workers did not outlive so often is a dead letter, up to 62,
            the default. What a worker has fetched and not begun counts as well.

    Raises: InvalidArgument (path, name), ConfigMismatch where the queue is there with other
        settings, and what `millstream.open` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queue_name: str = "taskiq",
        durability: Durability | None = None,
        capacity: int | None = None,
        lease: float = 60.0,
        max_attempts: int = 62,
    ) -> None:
        super().__init__()
        self.queue_name = queue_name
        self.listening = False
        self._settings: dict[str, Any] = {
            "priorities": LANES,
            "lease": lease,
            "retry": RetryPolicy(max_attempts=max_attempts, backoff=0.0),
            "capacity": capacity,
            "durability": durability,
        }
        self._lease = lease
        self._share = Share(path, self, lambda share: share.queue(queue_name, self._settings))

    @property
    def renewal(self) -> Renewal:
        """What renews the leases of this process."""
        return self._share.renewal(self._lease)

    def queue(self, name: str) -> millstream.Queue:
        """The store's queue of that name, made where it is not there. Raises ConfigMismatch."""
        return self._share.queue(name, self._settings)

    async def startup(self) -> None:
        """Begin; also again, after `shutdown`."""
        self._share.begin()
        await super().startup()

    async def shutdown(self) -> None:
        """End, and close the store, where nothing else of this process uses it."""
        self.listening = False
        await super().shutdown()
        self._share.end()

    async def kick(self, message: BrokerMessage) -> None:
        """Put a task.

        Raises: InvalidArgument for a label that is none, QueueFull, and what `Queue.put` raises:
        taskiq raises its SendTaskError from it.
        """
        labels = message.labels
        queue = self.queue(labels.get("queue_name", self.queue_name))
        lane = _number(labels, "priority")
        if lane not in range(10):
            raise InvalidArgument(f"label priority {lane!r}: expected 0 to 9, 9 the most urgent")
        await queue.aput(
            message.message,
            priority=lane_of(int(lane)),
            delay=max(_number(labels, "delay"), 0.0),
            timeout=PUT_SECONDS,
        )

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Yield tasks as they come, each leased until it is acknowledged."""
        self.listening = True
        try:
            while True:
                lease = await self.queue(self.queue_name).aget()
                yield AckableMessage(data=lease.value, ack=Acknowledgement(self, lease))
        finally:
            self.listening = False


def _number(labels: dict[str, Any], name: str) -> float:
    """The value of a label, which taskiq sends as a text; 0 where there is none."""
    try:
        return float(labels.get(name, 0))
    except (TypeError, ValueError):
        raise InvalidArgument(f"label {name} {labels[name]!r}: expected a number") from None


class MillstreamResultBackend(AsyncResultBackend[Any]):  # type: ignore[misc]
    """Results and progress of taskiq in a store, for `with_result_backend`.

    A process that asks keeps in memory where those lie that have not expired, about 250 bytes for
    each; a worker that only stores them keeps nothing.

    Durability: as of `MillstreamBroker`.

    Args:
        path: the directory of the store, as a rule that of the broker.
        namespace: the name of the stream that keeps them.
        result_ex_time: seconds for which a result is kept; default a day.
        serializer: of taskiq; default JSON, for which a result must be what JSON knows. Take one
            that pickles only where all who write to the store are trusted.
        durability: "process", "interval" or "sync"; default: as stored.

    Raises: InvalidArgument, ConfigMismatch, and what `millstream.open` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "taskiq-results",
        result_ex_time: float = 86400.0,
        serializer: TaskiqSerializer | None = None,
        durability: Durability | None = None,
    ) -> None:
        if not result_ex_time > 0:
            raise InvalidArgument(f"result_ex_time {result_ex_time!r}: expected seconds above 0")
        self.namespace = namespace
        self.result_ex_time = result_ex_time
        self.serializer = JSONSerializer() if serializer is None else serializer
        self._durability = durability
        self._share = Share(path, self, lambda share: share.rows(namespace, durability))

    @property
    def _rows(self) -> Rows:
        return self._share.rows(self.namespace, self._durability)

    async def startup(self) -> None:
        """Begin; also again, after `shutdown`."""
        self._share.begin()

    async def shutdown(self) -> None:
        """Close the store, where nothing else of this process uses it."""
        self._share.end()

    async def _put(self, kind: str, task_id: str, value: Any) -> None:
        json = isinstance(self.serializer, JSONSerializer)
        data = self.serializer.dumpb(value.model_dump(mode="json") if json else value)
        key, rows = (kind + task_id).encode(), self._rows
        await _call(rows.durability, lambda: rows.put(key, data, self.result_ex_time))

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        """Store a result. Raises what the serializer raises for it."""
        await self._put("=", task_id, result)

    async def is_result_ready(self, task_id: str) -> bool:
        """Is there a result?"""
        return self._rows.get(f"={task_id}".encode()) is not None

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:
        """A result; taskiq keeps no logs. Raises ResultGetError where there is none."""
        data = self._rows.get(f"={task_id}".encode())
        if data is None:
            raise ResultGetError
        found = self.serializer.loadb(data)
        return found if isinstance(found, TaskiqResult) else TaskiqResult.model_validate(found)

    async def set_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        """Store how far a task is."""
        await self._put("~", task_id, progress)

    async def get_progress(self, task_id: str) -> TaskProgress[Any] | None:
        """How far a task is; None: it has not said."""
        data = self._rows.get(f"~{task_id}".encode())
        if data is None:
            return None
        found = self.serializer.loadb(data)
        return found if isinstance(found, TaskProgress) else TaskProgress.model_validate(found)


class MillstreamScheduleSource(ScheduleSource):  # type: ignore[misc]
    """Schedules of taskiq in a store, among the sources of a `TaskiqScheduler`.

    Any process adds and deletes them; `taskiq scheduler` sees it at its next look, 60 s as a rule.
    A schedule with a `time` goes when it has been sent; where the scheduler is killed between the
    two, it is sent again. Run one scheduler: two send each task twice, whatever the source.

    Durability: what was added survives the kill of any process.

    Args:
        path: the directory of the store, as a rule that of the broker.
        namespace: the name of the compacted stream that keeps them.
        durability: "process", "interval" or "sync"; default: as stored.

    Raises: InvalidArgument, ConfigMismatch, and what `millstream.open` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "taskiq-schedules",
        durability: Durability | None = None,
    ) -> None:
        self.namespace = namespace
        self._durability = durability
        self._share = Share(path, self, self._stream_of)

    def _stream_of(self, share: Share) -> millstream.Stream:
        def make(store: millstream.Store) -> millstream.Stream:
            options: dict[str, Any] = {"compact": Compaction(), "segment_bytes": "1MiB"}
            durability = self._durability
            return store.stream(self.namespace, partitions=1, durability=durability, **options)

        return share.keep(("schedules", self.namespace), make)

    @property
    def _stream(self) -> millstream.Stream:
        return self._stream_of(self._share)

    async def startup(self) -> None:
        """Begin; also again, after `shutdown`."""
        self._share.begin()

    async def shutdown(self) -> None:
        """Close the store, where nothing else of this process uses it."""
        self._share.end()

    async def get_schedules(self) -> list[ScheduledTask]:
        """All schedules, the oldest first."""
        found: dict[bytes | None, ScheduledTask] = {}
        for batch in self._stream.read(partition=0, start="earliest"):
            for key, value in zip(batch.keys, batch.values, strict=True):
                found.pop(key, None)
                if value is not None:
                    found[key] = ScheduledTask.model_validate_json(value)
        return list(found.values())

    async def _set(self, schedule_id: str, value: bytes | None) -> None:
        stream = self._stream
        await _call(stream.durability, lambda: stream.append(value, key=schedule_id.encode()))

    async def add_schedule(self, schedule: ScheduledTask) -> None:
        """Add a schedule, or replace the one of its id."""
        await self._set(schedule.schedule_id, schedule.model_dump_json().encode())

    async def delete_schedule(self, schedule_id: str) -> None:
        """Remove a schedule."""
        await self._set(schedule_id, None)

    async def post_send(self, task: ScheduledTask) -> None:
        """A task was sent: one with a time goes, of others the next time comes."""
        if task.time is not None and task.cron is None and task.interval is None:
            await self.delete_schedule(task.schedule_id)
