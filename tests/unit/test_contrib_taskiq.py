"""`contrib.taskiq` with taskiq's own receiver and its command, and what more it promises."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import pytest

import millstream

pytest.importorskip("taskiq")

from taskiq import (
    Context,
    NoResultError,
    ScheduledTask,
    SendTaskError,
    SimpleRetryMiddleware,
    SmartRetryMiddleware,
    TaskiqDepends,
    TaskiqMiddleware,
    TaskiqScheduler,
)
from taskiq.api import run_receiver_task
from taskiq.depends.progress_tracker import ProgressTracker
from taskiq.exceptions import ResultGetError
from taskiq.serializers import PickleSerializer

from millstream.contrib.taskiq import (
    MillstreamBroker,
    MillstreamResultBackend,
    MillstreamScheduleSource,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@asynccontextmanager
async def running(path, **options):
    """A broker with results, as a program has it."""
    broker = MillstreamBroker(path, durability="process", **options)
    broker = broker.with_result_backend(MillstreamResultBackend(path))
    await broker.startup()
    try:
        yield broker
    finally:
        await broker.shutdown()


@asynccontextmanager
async def worker(broker, **options):
    broker.is_worker_process = True
    task = asyncio.create_task(run_receiver_task(broker, **options))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await turn()


async def turn():
    """Let the worker go on."""
    await asyncio.to_thread(int)


def stats(broker):
    return broker.queue(broker.queue_name).stats()


# --- tasks ----------------------------------------------------------------------------------------


def test_a_task_is_off_the_queue_when_its_result_is_saved(path):
    async def main():
        async with running(path) as broker:

            @broker.task
            async def look(word: str) -> list:
                return [word, stats(broker).leased]

            @broker.task
            def fail() -> None:
                raise ValueError("no")

            sent, bad = await look.kiq("x"), await fail.kiq()
            assert not await sent.is_ready()
            async with worker(broker):
                found = await sent.wait_result(check_interval=0.01, timeout=60)
                failed = await bad.wait_result(check_interval=0.01, timeout=60)
                await until(lambda: stats(broker).unfinished == 0)
            assert found.return_value[0] == "x"
            assert found.return_value[1] >= 1
            assert isinstance(failed.error, ValueError)

    asyncio.run(main())


def test_a_task_with_a_delay_waits_in_the_store_and_in_no_worker(path):
    async def main():
        async with running(path) as broker:
            ran = []
            late = broker.task(task_name="late")(lambda: ran.append(time.monotonic()))
            sent = time.monotonic()
            await late.kicker().with_labels(delay=0.4).kiq()
            async with worker(broker):
                while (now := stats(broker)).delayed:
                    assert now.leased == 0
                    await turn()
                await until(lambda: ran)
            assert ran[0] - sent >= 0.4

    asyncio.run(main())


def test_priorities_are_those_of_amqp_and_a_label_names_another_queue(path):
    async def main():
        async with running(path) as broker:
            one = broker.task(task_name="one")(lambda *_: None)
            for priority in (0, 9, 5, 2):
                await one.kicker().with_labels(priority=priority).kiq(priority)
            found = [broker.formatter.loads(m.value) for m in broker.queue("taskiq").peek(4)]
            assert [message.args for message in found] == [[9], [5], [2], [0]]
            await one.kicker().with_labels(queue_name="other").kiq()
            assert broker.queue("other").stats().ready == 1

    asyncio.run(main())


@pytest.mark.parametrize("labels", [{"delay": "soon"}, {"priority": 10}, {"priority": "high"}])
def test_labels_that_are_none_are_refused_when_the_task_is_sent(path, labels):
    async def main():
        async with running(path) as broker:
            one = broker.task(task_name="one")(lambda *_: None)
            with pytest.raises(SendTaskError) as raised:
                await one.kicker().with_labels(**labels).kiq()
            assert isinstance(raised.value.__cause__, millstream.InvalidArgument)
            assert next(iter(labels)) in str(raised.value.__cause__)
            assert stats(broker).unfinished == 0

    asyncio.run(main())


@pytest.mark.parametrize("middleware", [SimpleRetryMiddleware, SmartRetryMiddleware])
def test_retries_of_taskiq(path, middleware):
    async def main():
        async with running(path) as broker:
            options = {"default_delay": 0.01} if middleware is SmartRetryMiddleware else {}
            broker.add_middlewares(middleware(default_retry_count=3, **options))
            tried = []

            @broker.task(retry_on_error=True)
            async def fail():
                tried.append(1)
                raise ValueError("no")

            sent = await fail.kiq()
            async with worker(broker):
                found = await sent.wait_result(check_interval=0.01, timeout=60)
            assert found.is_err
            assert len(tried) == 3

    asyncio.run(main())


def test_a_task_that_no_acknowledgement_ends_comes_again(path, monkeypatch, caplog):
    """Where a middleware fails taskiq lets go of the message: nobody would ever get it again."""
    monkeypatch.setattr("millstream.contrib.taskiq.AGAIN_SECONDS", 0.0)

    class Broken(TaskiqMiddleware):
        failures = 1

        async def post_execute(self, message, result):
            if self.failures:
                self.failures -= 1
                raise OSError("away for a moment")

    async def main():
        # What pytest keeps of what is logged would keep the message as well.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with running(path) as broker:
            broker.add_middlewares(Broken())
            ran = []
            one = broker.task(task_name="one")(lambda: ran.append(1))
            await one.kiq()
            async with worker(broker):
                await until(lambda: ran)
                await one.kiq()
                await until(lambda: len(ran) == 3 and stats(broker).unfinished == 0)
        assert "was not acknowledged" in caplog.text

    asyncio.run(main())


def test_a_worker_that_stops_gives_back_what_it_has_not_begun(path):
    async def main():
        async with running(path) as broker:
            begun, go = asyncio.Event(), asyncio.Event()

            @broker.task
            async def one():
                begun.set()
                await go.wait()

            for _ in range(3):
                await one.kiq()
            async with worker(broker, max_async_tasks=1, max_prefetch=1):
                await begun.wait()
                await until(lambda: stats(broker).leased >= 2)
                go.set()
            await until(lambda: gc.collect() >= 0 and stats(broker).leased == 0)
            for message in broker.queue("taskiq").get_many(9, timeout=0):
                assert message.attempt == 1

    asyncio.run(main())


def test_a_task_may_acknowledge_by_itself(path):
    async def main():
        async with running(path) as broker:

            @broker.task(ack_type="manual")
            async def one(context: Annotated[Context, TaskiqDepends()]) -> int:
                await context.ack()
                return stats(broker).unfinished

            sent = await one.kiq()
            async with worker(broker):
                found = await sent.wait_result(check_interval=0.01, timeout=60)
            assert found.return_value == 0

    asyncio.run(main())


def test_the_lease_of_a_long_task_is_renewed(path):
    async def main():
        async with running(path, lease=0.3) as broker:
            begun = asyncio.Event()

            @broker.task
            async def long() -> int:
                begun.set()
                await asyncio.to_thread(threading.Event().wait, 1.0)  # three leases
                return stats(broker).redelivered

            sent = await long.kiq()
            async with worker(broker):
                await begun.wait()
                found = await sent.wait_result(check_interval=0.01, timeout=60)
            assert found.return_value == 0

    asyncio.run(main())


APP = """
import os, signal
from millstream.contrib.taskiq import MillstreamBroker

broker = MillstreamBroker(os.environ["DATA"], durability="process")

@broker.task(task_name="wait")
def wait() -> None:
    os.write(int(os.environ["SAYS"]), b"runs\\n")
    signal.pause()
"""


def test_a_task_of_a_killed_worker_process_comes_back(path, tmp_path):
    (tmp_path / "app.py").write_text(APP)
    said, says = os.pipe()
    env = {**os.environ, "DATA": str(path), "SAYS": str(says)}
    package = str(Path(millstream.__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), package, *filter(None, sys.path)])

    async def send():
        async with running(path) as broker:
            await broker.task(task_name="wait")(lambda *_: None).kiq()

    asyncio.run(send())
    command = [sys.executable, "-m", "taskiq", "worker", "app:broker", "--workers", "1"]
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, pass_fds=[says], start_new_session=True,
        stdout=null, stderr=null,
    ) as process:  # fmt: skip
        os.close(says)
        try:
            assert os.read(said, 5) == b"runs\n"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            os.close(said)
    with millstream.open(path) as store:
        assert store.queue("taskiq").get(timeout=60).attempt == 2


# --- results --------------------------------------------------------------------------------------


def test_results_last_for_their_time(path, monkeypatch):
    async def main():
        results = MillstreamResultBackend(path, result_ex_time=7200)
        async with running(path) as broker:
            sent = await broker.with_result_backend(results).task(task_name="one")(lambda: 5).kiq()
            async with worker(broker):
                await sent.wait_result(check_interval=0.01, timeout=60)
        await results.startup()
        assert results._rows.stream.retention.age == 7200
        later = time.time() + 7000
        monkeypatch.setattr("millstream.contrib.rows.time.time", lambda: later)
        assert (await sent.get_result()).return_value == 5
        later += 300
        assert not await sent.is_ready()
        with pytest.raises(ResultGetError):
            await results.get_result(sent.task_id)
        await results.shutdown()

    asyncio.run(main())


@pytest.mark.parametrize("serializer", [None, PickleSerializer()])
def test_progress_and_results_by_serializer(path, serializer):
    async def main():
        async with running(path) as broker:
            broker.with_result_backend(MillstreamResultBackend(path, serializer=serializer))

            @broker.task
            async def one(progress: Annotated[ProgressTracker[int], TaskiqDepends()]) -> dict:
                await progress.set_progress("halfway", 50)
                return {"a": [1]}

            sent = await one.kiq()
            assert await sent.get_progress() is None
            async with worker(broker):
                found = await sent.wait_result(check_interval=0.01, timeout=60)
            assert found.return_value == {"a": [1]}
            progress = await sent.get_progress()
            assert (progress.state, progress.meta) == ("halfway", 50)

    asyncio.run(main())


def test_a_task_without_a_result_has_none(path):
    async def main():
        async with running(path) as broker:

            @broker.task
            async def one() -> None:
                raise NoResultError

            sent = await one.kiq()
            async with worker(broker):
                await until(lambda: stats(broker).unfinished == 0)
            assert not await sent.is_ready()

    asyncio.run(main())


# --- schedules ------------------------------------------------------------------------------------


def test_schedules_are_of_all_processes_and_one_with_a_time_is_sent_once(path):
    async def main():
        async with running(path) as broker:
            source, other = MillstreamScheduleSource(path), MillstreamScheduleSource(path)
            one = broker.task(task_name="one")(lambda *_: None)
            hourly = await one.schedule_by_cron(source, "0 * * * *", 1)
            at = datetime.now(UTC) + timedelta(hours=1)
            once = await one.schedule_by_time(source, at, 2)
            often = await one.schedule_by_interval(source, 30, 3)
            found = await other.get_schedules()
            assert [schedule.args for schedule in found] == [[1], [2], [3]]
            assert found[1].time == at
            scheduler = TaskiqScheduler(broker, [other])
            for schedule in found:
                await scheduler.on_ready(other, schedule)
            assert stats(broker).ready == 3
            assert [schedule.args for schedule in await source.get_schedules()] == [[1], [3]]
            await hourly.unschedule()
            await often.unschedule()
            assert await other.get_schedules() == []
            await other.shutdown()
            await other.startup()
            assert await other.get_schedules() == []
            assert once.schedule_id not in (hourly.schedule_id, often.schedule_id)
            await other.shutdown()
            await source.shutdown()

    asyncio.run(main())


def test_a_schedule_of_an_id_replaces_the_one_before(path):
    async def main():
        source = MillstreamScheduleSource(path)
        for minute in ("1 * * * *", "2 * * * *"):
            schedule = ScheduledTask(
                task_name="one", labels={}, args=[], kwargs={}, schedule_id="a", cron=minute
            )
            await source.add_schedule(schedule)
        (found,) = await source.get_schedules()
        assert found.cron == "2 * * * *"
        await source.shutdown()

    asyncio.run(main())


# --- what is refused at start-up ------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [MillstreamBroker, MillstreamResultBackend, MillstreamScheduleSource]
)
def test_a_path_that_is_no_store_is_refused(tmp_path, kind):
    with pytest.raises(millstream.InvalidArgument, match=rf"{kind.__name__}\(None\).*directory"):
        kind(None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(millstream.StorageError, match="is not a directory"):
        kind(tmp_path / "file")
    name = {"queue_name": "my app"} if kind is MillstreamBroker else {"namespace": "my app"}
    with pytest.raises(millstream.InvalidArgument, match="my app"):
        kind(tmp_path / "store", **name)


def test_other_settings_than_stored_are_refused(path):
    broker = MillstreamBroker(path, lease=60.0)
    with pytest.raises(millstream.ConfigMismatch, match="lease"):
        MillstreamBroker(path, lease=5.0)
    with millstream.open(path) as store:
        store.stream("taskiq-results", partitions=3)
        store.stream("taskiq-schedules", partitions=3)
    for kind in (MillstreamResultBackend, MillstreamScheduleSource):
        with pytest.raises(millstream.ConfigMismatch, match="partitions"):
            kind(path)
    asyncio.run(broker.shutdown())


def test_a_time_of_results_that_is_none_is_refused(path):
    with pytest.raises(millstream.InvalidArgument, match="result_ex_time -1"):
        MillstreamResultBackend(path, result_ex_time=-1)
