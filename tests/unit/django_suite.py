"""`contrib.django` in a Django project: the cases of the tests of django-tasks and django-tasks-db.

As a program it runs them under Django's test runner, in a directory that is its argument.
"""

# ruff: noqa: E402

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from unittest import mock

os.environ["DJANGO_DIRECTORY"] = sys.argv[1]
os.environ["DJANGO_SETTINGS_MODULE"] = "django_settings"

import django

django.setup()

import django_jobs as jobs
from django.conf import settings
from django.core.exceptions import SuspiciousOperation
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase, override_settings
from django.test.runner import DiscoverRunner
from django.utils import timezone
from django.utils.connection import ConnectionProxy

import millstream
from millstream.contrib.django import MillstreamBackend
from millstream.contrib.django import backend as ours
from millstream.contrib.django.backend import (
    LOGGER_OF_TASKS,
    InvalidTask,
    InvalidTaskBackend,
    base,
    exceptions,
    task_backends,
    task_enqueued,
)
from millstream.testing import clock

READY, RUNNING, FAILED, SUCCESSFUL = (
    base.TaskResultStatus[name] for name in ("READY", "RUNNING", "FAILED", "SUCCESSFUL")
)
TaskResultDoesNotExist = exceptions.TaskResultDoesNotExist
default_task_backend = ConnectionProxy(task_backends, "default")
GRACELESS = ("--grace", "0", "--threads", "2")
UNTIL_EMPTY = {"batch": True, "verbosity": 0}


def work(**options):
    """Run a worker in this process until it has nothing to do; what it printed."""
    out = StringIO()
    call_command("millstream_worker", stdout=out, **{**UNTIL_EMPTY, **options})
    return out.getvalue()


def tasks_with(**changes):
    """Settings whose default backend has other ones."""
    default = settings.TASKS["default"]
    options = {**default["OPTIONS"], **changes.pop("OPTIONS", {})}
    return override_settings(TASKS={"default": {**default, **changes, "OPTIONS": options}})


class Cases(TransactionTestCase):
    databases = ("default", "other")

    def setUp(self):
        jobs.ran.clear()
        opened = default_task_backend.opened()
        for name in opened.queues():
            for queue in opened.lanes(name).by_urgency():
                queue.purge()
                queue.dead.purge()

    def waiting(self):
        return sum(len(queue) for queue in self.queues())

    def queues(self):
        return default_task_backend.opened().lanes("default").by_urgency()

    def queue(self):
        """That of the priorities 0 to 7."""
        return default_task_backend.opened().lanes("default").queues[0]


class OfBackend(Cases):
    def test_using_correct_backend(self):
        self.assertEqual(default_task_backend, task_backends["default"])
        self.assertIsInstance(task_backends["default"], MillstreamBackend)
        self.assertEqual(default_task_backend.alias, "default")

    def check_enqueued(self, task, result, args, kwargs):
        self.assertEqual(result.status, READY)
        self.assertFalse(result.is_finished)
        for when in (result.started_at, result.last_attempted_at, result.finished_at):
            self.assertIsNone(when)
        self.assertIsNotNone(result.enqueued_at)
        with self.assertRaisesMessage(ValueError, "Task has not finished yet"):
            _ = result.return_value
        self.assertEqual((result.task, result.args, result.kwargs), (task, args, kwargs))
        self.assertEqual(result.attempts, 0)

    def test_enqueue_task(self):
        for task in (jobs.noop, jobs.noop_async):
            received = []

            def capture(sender, task_result, received=received, **_):
                received.append((sender, task_result))

            task_enqueued.connect(capture)
            with self.assertNumQueries(0):
                result = task.enqueue(1, two=3)
            task_enqueued.disconnect(capture)
            self.check_enqueued(task, result, [1], {"two": 3})
            self.assertEqual(received, [(MillstreamBackend, result)])

    async def test_enqueue_task_async(self):
        for task in (jobs.noop, jobs.noop_async):
            self.check_enqueued(task, await task.aenqueue(), [], {})

    def test_get_result(self):
        result = default_task_backend.enqueue(jobs.noop, [], {})
        self.assertEqual(default_task_backend.get_result(result.id), result)

    async def test_get_result_async(self):
        result = await default_task_backend.aenqueue(jobs.noop, [], {})
        self.assertEqual(await default_task_backend.aget_result(result.id), result)

    def check_refreshed(self, result):
        for when in (result.started_at, result.last_attempted_at, result.finished_at):
            self.assertIsNotNone(when)
        self.assertEqual(result.status, SUCCESSFUL)
        self.assertTrue(result.is_finished)
        self.assertEqual(result.return_value, 42)
        self.assertEqual(result.attempts, 1)

    def test_refresh_result(self):
        result = jobs.calculate_meaning_of_life.enqueue()
        work()
        self.assertEqual((result.status, result.attempts), (READY, 0))
        result.refresh()
        self.check_refreshed(result)

    def test_refresh_result_async(self):
        result = jobs.calculate_meaning_of_life.enqueue()
        work()
        asyncio.run(result.arefresh())
        self.check_refreshed(result)

    def test_wait(self):
        result = jobs.calculate_meaning_of_life.enqueue()
        self.assertEqual(default_task_backend.wait(result.id, timeout=0.01).status, READY)
        work()
        self.check_refreshed(default_task_backend.wait(result.id, timeout=60))

    def test_get_missing_result(self):
        for name in ("no such result", "123", 123):
            with self.assertRaises(TaskResultDoesNotExist):
                default_task_backend.get_result(name)

    async def test_get_missing_result_async(self):
        with self.assertRaises(TaskResultDoesNotExist):
            await default_task_backend.aget_result("123")

    def test_result_of_another_task(self):
        result = jobs.noop.enqueue()
        with self.assertRaises(exceptions.TaskResultMismatch):
            jobs.note.get_result(result.id)

    def test_invalid_task_path(self):
        record = {**json.loads(ours.dumps(jobs.noop.enqueue())), "task": "subprocess.check_output"}
        with self.assertRaisesMessage(SuspiciousOperation, "does not point to a Task"):
            ours.loads(json.dumps(record).encode())

    def test_missing_task_path(self):
        record = {**json.loads(ours.dumps(jobs.noop.enqueue())), "task": "missing.func"}
        with self.assertRaises(ImportError):
            ours.loads(json.dumps(record).encode())

    def test_check(self):
        self.assertEqual(list(default_task_backend.check()), [])
        call_command("check", verbosity=0)

    def test_enqueue_logs(self):
        with self.assertLogs(LOGGER_OF_TASKS, level="DEBUG") as logs:
            result = jobs.noop.enqueue()
        (line,) = logs.output
        self.assertIn("enqueued", line)
        self.assertIn(result.id, line)

    def test_priority_range(self):
        for priority in (-100, 0, 100):
            jobs.noop.using(priority=priority).enqueue()
        for priority in (-101, 101, 3.1):
            with self.assertRaises(InvalidTask):
                jobs.noop.using(priority=priority)

    def test_run_after_must_be_aware(self):
        with self.assertRaisesMessage(InvalidTask, "run_after must be an aware datetime."):
            jobs.noop.using(run_after=datetime(2030, 1, 1))

    def test_run_after_without_time_zones(self):
        with override_settings(USE_TZ=False):
            later = timezone.now() + timedelta(hours=1)
            result = jobs.noop.using(run_after=later).enqueue()
            found = default_task_backend.get_result(result.id)
            self.assertEqual(found.task.run_after, later)
            self.assertEqual(found, result)

    def test_validate_on_enqueue(self):
        with self.assertRaisesMessage(InvalidTask, "Queue 'unknown' is not valid for backend"):
            jobs.noop.using(queue_name="unknown")

    def test_any_queue_where_none_is_named(self):
        with tasks_with(QUEUES=[]):
            jobs.note.using(queue_name="of.mine").enqueue(1)
            with self.assertRaisesMessage(InvalidTask, "expected 1 to 50 characters"):
                jobs.note.using(queue_name="of mine")
            work()
            self.assertEqual(jobs.ran, [1])
            default_task_backend.close()

    def test_arguments_that_are_no_json(self):
        with self.assertRaises(TypeError):
            jobs.noop.enqueue(datetime.now())

    def test_too_long_arguments(self):
        with self.assertRaisesMessage(millstream.LimitExceeded, "django_jobs.noop"):
            jobs.noop.enqueue("x" * (17 << 20))
        self.assertEqual(self.waiting(), 0)

    def test_a_full_queue_refuses_and_leaves_no_result(self):
        with tasks_with(OPTIONS={"path": f"{sys.argv[1]}/small", "capacity": 1}):
            jobs.noop.enqueue()
            with mock.patch.object(ours, "PUT_SECONDS", 0), self.assertRaises(millstream.QueueFull):
                jobs.noop.enqueue()
            results = default_task_backend.opened().results
            results.catch_up()
            self.assertEqual(len(results.at), 1)
            default_task_backend.close()

    def test_a_forked_process_enqueues(self):
        before = jobs.noop.enqueue()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.write(writer, jobs.noop.enqueue().id.encode())
                default_task_backend.get_result(before.id)
                default_task_backend.close()
                os._exit(0)
            os._exit(1)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        result = default_task_backend.get_result(os.read(reader, 100).decode())
        self.assertEqual(result.status, READY)
        os.close(reader)
        os.close(writer)


class OfTransactions(Cases):
    def test_waits_until_transaction_commit(self):
        with transaction.atomic():
            result = jobs.noop.enqueue()
            self.assertEqual(self.waiting(), 0)
            self.assertIsNone(result.enqueued_at)
            with self.assertRaises(TaskResultDoesNotExist):
                result.refresh()
        self.assertEqual(self.waiting(), 1)
        self.assertIsNotNone(result.enqueued_at)
        self.assertEqual(default_task_backend.get_result(result.id), result)

    def test_is_not_there_after_a_rollback(self):
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            result = jobs.noop.enqueue()
            _ = 1 / 0
        self.assertEqual(self.waiting(), 0)
        with self.assertRaises(TaskResultDoesNotExist):
            result.refresh()

    def test_a_savepoint_that_is_rolled_back(self):
        with transaction.atomic():
            jobs.noop.enqueue()
            with contextlib.suppress(ZeroDivisionError), transaction.atomic():
                jobs.noop.enqueue()
                _ = 1 / 0
        self.assertEqual(self.waiting(), 1)

    def test_two_databases(self):
        with transaction.atomic(using="other"):
            with transaction.atomic():
                jobs.noop.enqueue()
            self.assertEqual(self.waiting(), 0)
        self.assertEqual(self.waiting(), 1)
        with contextlib.suppress(ZeroDivisionError), transaction.atomic(using="other"):
            with transaction.atomic():
                jobs.noop.enqueue()
            _ = 1 / 0
        self.assertEqual(self.waiting(), 1)

    def test_on_commit_of_the_program(self):
        with transaction.atomic():
            transaction.on_commit(jobs.noop.enqueue)
            self.assertEqual(self.waiting(), 0)
        self.assertEqual(self.waiting(), 1)

    def test_without_waiting(self):
        with tasks_with(ENQUEUE_ON_COMMIT=False), transaction.atomic():
            jobs.noop.enqueue()
            self.assertEqual(self.waiting(), 1)

    def test_autocommit_that_is_off_is_refused_with_the_reason(self):
        transaction.set_autocommit(False)
        try:
            with self.assertRaisesMessage(
                transaction.TransactionManagementError, "manual transaction management"
            ):
                jobs.noop.enqueue()
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)


class InTestCase(TestCase):
    """Django's TestCase, which is a transaction that is never committed."""

    def test_captured(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            result = jobs.calculate_meaning_of_life.enqueue()
        self.assertEqual(len(callbacks), 1)
        work()
        result.refresh()
        self.assertEqual(result.return_value, 42)
        self.assertTrue(connection.in_atomic_block)


class OfWorker(Cases):
    def test_run_enqueued_task(self):
        for task in (jobs.noop, jobs.noop_async):
            result = task.enqueue()
            work(worker_id="it")
            result.refresh()
            self.assertEqual(result.status, SUCCESSFUL)
            self.assertEqual(result.worker_ids, ["it"])
            self.assertLessEqual(result.enqueued_at, result.started_at)
            self.assertLessEqual(result.started_at, result.finished_at)
            self.assertEqual(self.waiting(), 0)

    def test_no_tasks(self):
        self.assertIn("ends", work(verbosity=1))

    def test_failing_tasks(self):
        for task, error, text in [
            (jobs.fail, ValueError, "This task failed due to ValueError"),
            (jobs.exit_system, SystemExit, "This task failed due to SystemExit"),
            (jobs.interrupt, KeyboardInterrupt, "This task failed due to KeyboardInterrupt"),
        ]:
            result = task.enqueue()
            with self.assertLogs(LOGGER_OF_TASKS, level="ERROR") as logs:
                work(verbosity=1)
            self.assertIn(text, logs.output[0])
            result.refresh()
            self.assertEqual(result.status, FAILED)
            with self.assertRaisesMessage(ValueError, "Task failed"):
                _ = result.return_value
            self.assertIs(result.errors[0].exception_class, error)
            self.assertTrue(result.errors[0].traceback.endswith(f"{error.__name__}: {text}\n"))
            self.assertEqual(self.waiting(), 0)

    def test_complex_exception(self):
        result = jobs.fail_complexly.enqueue()
        work()
        result.refresh()
        self.assertIs(result.errors[0].exception_class, ValueError)
        self.assertIn('ValueError(ValueError("This task failed"))', result.errors[0].traceback)

    def test_return_values_that_cannot_be_kept(self):
        for task, error, text in [
            (jobs.return_what_is_no_json, TypeError, "Unsupported type"),
            (jobs.return_too_much, millstream.LimitExceeded, "return_too_much"),
        ]:
            result = task.enqueue()
            work()
            result.refresh()
            self.assertEqual(result.status, FAILED)
            self.assertIsNone(result._return_value)
            self.assertIs(result.errors[0].exception_class, error)
            self.assertIn(text, result.errors[0].traceback)

    def test_context(self):
        told, attempt = jobs.tell_id.enqueue(), jobs.tell_attempt.enqueue()
        work()
        told.refresh()
        attempt.refresh()
        self.assertEqual((told.return_value, attempt.return_value), (told.id, 1))

    def test_all_priorities_in_order(self):
        order = [0, 1, -100, 100, 5, -1, 8, 7, 2, -8, -9, 99, 0, 16, -99]
        for place, priority in enumerate(order):
            jobs.note.using(priority=priority).enqueue([priority, place])
        work()
        expected = sorted(enumerate(order), key=lambda one: (-one[1], one[0]))
        self.assertEqual(jobs.ran, [[priority, place] for place, priority in expected])

    def test_run_after(self):
        with clock() as time:
            later = datetime.now(UTC) + timedelta(days=40)
            result = jobs.note.using(run_after=later, priority=9).enqueue(1)
            jobs.note.enqueue(0)
            work()
            self.assertEqual(jobs.ran, [0])
            time.advance(40 * 86400)
            work()
            self.assertEqual(jobs.ran, [0, 1])
            self.assertEqual(default_task_backend.get_result(result.id).task.run_after, later)

    def test_queues(self):
        jobs.note.using(queue_name="queue-1").enqueue("1")
        jobs.note.enqueue("default")
        work(queue_name="queue-1")
        self.assertEqual(jobs.ran, ["1"])
        work(queue_name="*")
        self.assertEqual(jobs.ran, ["1", "default"])

    def test_no_queue_waits_for_another(self):
        for number in range(20):
            jobs.note.enqueue(number)
            jobs.note.using(queue_name="queue-1").enqueue(100 + number)
        work(max_tasks=10)
        self.assertEqual(len([number for number in jobs.ran if number >= 100]), 5)

    def test_max_tasks(self):
        for number in range(3):
            jobs.note.enqueue(number)
        work(max_tasks=2)
        self.assertEqual((jobs.ran, self.waiting()), ([0, 1], 1))
        work(max_tasks=0)
        self.assertEqual(self.waiting(), 1)

    def test_threads(self):
        results = [jobs.calculate_meaning_of_life.enqueue() for _ in range(30)]
        work(threads=4)
        for result in results:
            result.refresh()
            self.assertEqual(result.return_value, 42)

    def test_a_task_that_is_not_there_is_a_dead_letter_and_runs_when_it_is_redriven(self):
        result = jobs.gone.enqueue()
        with mock.patch.object(jobs, "gone", None), self.assertLogs("millstream.django", "ERROR"):
            work(verbosity=1)
        result.refresh()
        self.assertEqual(result.status, FAILED)
        self.assertIs(result.errors[0].exception_class, SuspiciousOperation)
        (letter,) = self.queue().dead.list()
        self.assertIn("does not point to a Task", letter.last_error)
        self.queue().dead.redrive()
        work()
        result.refresh()
        self.assertEqual(result.status, SUCCESSFUL)

    def test_what_others_put_is_a_dead_letter(self):
        for data in (b"\x80", b"[]", b"{}"):
            self.queue().put(data)
        with self.assertLogs("millstream.django", "ERROR"):
            work(verbosity=1)
        self.assertEqual(self.queue().stats().dead, 3)

    def test_a_result_that_cannot_be_stored(self):
        result = jobs.note.enqueue(1)
        full = millstream.StoreFull(28, "no space left", "store")
        with (
            mock.patch.object(ours.Opened, "transaction", side_effect=full),
            self.assertLogs("millstream.django", "ERROR"),
        ):
            work(verbosity=1)
        self.assertEqual(self.waiting(), 1)
        with clock() as time:
            time.advance(2)
            work()
        result.refresh()
        self.assertEqual((result.status, result.attempts), (SUCCESSFUL, 2))
        self.assertEqual(jobs.ran, [1, 1])

    def test_a_lease_that_was_lost(self):
        result = jobs.note.enqueue(1)
        with clock() as time:

            class Losing:
                def append(self, what):
                    time.advance(61)
                    message = queue.get(timeout=60)
                    message.release()

            queue = self.queue()
            with (
                mock.patch("millstream.contrib.django.worker.Renewal.begin"),
                mock.patch.object(jobs, "ran", Losing()),
                self.assertLogs("millstream.django", "WARNING") as logs,
            ):
                work(verbosity=1, max_tasks=1)
        self.assertIn("another worker has it", logs.output[0])
        result.refresh()
        self.assertFalse(result.is_finished)

    def test_wrong_words(self):
        for options, text in [
            ({"backend_name": "unknown"}, "doesn't exist"),
            ({"backend_name": "dummy"}, "no MillstreamBackend"),
            ({"queue_name": "unknown"}, "there are default, queue-1"),
            ({"threads": 0}, "--threads"),
            ({"worker_id": ""}, "--worker-id"),
            ({"worker_id": "x" * 65}, "--worker-id"),
        ]:
            with self.assertRaisesMessage(CommandError, text):
                work(**options)
        with (
            tasks_with(QUEUES=[]),
            self.assertRaisesMessage(CommandError, "queue 'bad name': expected"),
        ):
            work(queue_name="bad name")


class OfSettings(Cases):
    def test_each_is_an_error_at_start_up(self):
        path = Path(sys.argv[1])
        (path / "file").write_text("no store")
        with millstream.open(path / "others") as store:
            store.queue("django.default.default", priorities=8, capacity=2000, lease=7.0)
        for changes, text in [
            ({"OPTIONS": {"path": 1}}, "'path'"),
            ({"OPTIONS": {"path": str(path / "file")}}, "file"),
            ({"OPTIONS": {"path": "kafka://127.0.0.1"}}, "kafka"),
            ({"OPTIONS": {"path": str(path / "others")}}, "lease"),
            ({"OPTIONS": {"pathe": "x"}}, "'pathe'"),
            ({"OPTIONS": {"durability": "most"}}, "most"),
            ({"OPTIONS": {"capacity": "many"}}, "'capacity'"),
            ({"OPTIONS": {"lease": True}}, "'lease'"),
            ({"OPTIONS": {"lease": -1}}, "lease"),
            ({"OPTIONS": {"max_attempts": 62}}, "'max_attempts'"),
            ({"OPTIONS": {"result_ttl": 0}}, "'result_ttl'"),
            ({"QUEUES": ["with blank"]}, "with blank"),
            ({"ENQUEUE_ON_COMMIT": "yes"}, "ENQUEUE_ON_COMMIT"),
        ]:
            with self.subTest(text), tasks_with(**changes):
                with self.assertRaisesMessage(InvalidTaskBackend, text):
                    _ = task_backends["default"]
                with self.assertRaises(InvalidTaskBackend):
                    call_command("check", verbosity=0)
        only = {"default": {"BACKEND": settings.TASKS["default"]["BACKEND"]}}
        refused = self.assertRaisesMessage(InvalidTaskBackend, "OPTIONS['path']")
        with override_settings(TASKS=only), refused:
            _ = task_backends["default"]


class OfProcesses(Cases):
    def setUp(self):
        super().setUp()
        self.path = f"{sys.argv[1]}/{self.id().rpartition('.')[2]}"
        os.mkfifo(self.path)
        os.mkfifo(self.path + ".end")

    def start(self, *words, **env):
        command = [sys.executable, "-m", "django", "millstream_worker", "-v0", *words]
        worker = subprocess.Popen(command, env={**os.environ, **env})
        self.addCleanup(worker.wait)
        self.addCleanup(worker.kill)
        return worker

    def await_begin(self):
        return int(Path(self.path).read_text())

    def let_end(self, text="ended"):
        Path(self.path + ".end").write_text(text)

    def test_a_task_of_a_killed_worker_comes_back(self):
        result = jobs.say_and_wait.enqueue(self.path)
        first = self.start("--worker-id", "first")
        self.assertEqual(self.await_begin(), first.pid)
        result.refresh()
        self.assertEqual(result.status, RUNNING)
        self.assertEqual(result.worker_ids, ["first"])
        began = result.started_at
        first.kill()
        self.assertEqual(first.wait(), -signal.SIGKILL)
        second = self.start("--worker-id", "second", "--max-tasks", "1")
        self.assertEqual(self.await_begin(), second.pid)
        self.let_end()
        self.assertEqual(second.wait(), 0)
        result.refresh()
        self.assertEqual(result.return_value, "ended")
        self.assertEqual(result.worker_ids, ["first", "second"])
        self.assertEqual(result.started_at, began)
        self.assertGreater(result.last_attempted_at, began)
        self.assertEqual(self.waiting(), 0)

    def test_a_signal_lets_tasks_end(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            result = jobs.say_and_wait.enqueue(self.path)
            jobs.noop.enqueue()
            worker = self.start()
            self.await_begin()
            worker.send_signal(number)
            self.let_end()
            self.assertEqual(worker.wait(), 0)
            result.refresh()
            self.assertEqual(result.status, SUCCESSFUL)
            self.assertEqual(self.waiting(), 1)
            work()

    def test_a_second_signal_or_the_end_of_the_grace_gives_back(self):
        both = (signal.SIGTERM, signal.SIGINT)
        for words, signals in [((), both), (GRACELESS, both[:1])]:
            jobs.say_and_wait.enqueue(self.path)
            worker = self.start(*words)
            self.await_begin()
            for number in signals:
                worker.send_signal(number)
            self.assertEqual(worker.wait(), 1)
            (message,) = self.queue().peek(2)
            self.assertEqual((message.state, message.attempts), ("ready", 0))
            self.queue().purge()

    def test_a_task_that_kills_its_worker_each_time_fails(self):
        directory = f"{sys.argv[1]}/killers"
        os.mkdir(directory)
        with tasks_with(OPTIONS={"path": f"{directory}/store", "max_attempts": 2}):
            result = jobs.kill_worker.enqueue()
            env = {"DJANGO_DIRECTORY": directory, "DJANGO_ATTEMPTS": "2"}
            for _ in range(2):
                self.assertEqual(self.start(**env).wait(), -signal.SIGKILL)
            result.refresh()
            self.assertEqual((result.status, result.attempts), (RUNNING, 2))
            self.assertEqual(self.start("--max-tasks", "1", **env).wait(), 0)
            result.refresh()
            self.assertEqual(result.status, FAILED)
            self.assertIs(result.errors[0].exception_class, millstream.WorkerError)
            self.assertIn("2 times", result.errors[0].traceback)
            self.assertEqual(self.queue().stats().dead, 1)
            default_task_backend.close()

    def test_storm_of_kills(self):
        seed, kills, out = int(os.environ.get("MILLSTREAM_SEED") or 5), 30, f"{self.path}.ran"
        print("seed", seed, file=sys.stderr)
        dice = random.Random(seed)

        def begin():
            pid = os.fork()
            if pid == 0:
                try:
                    call_command("millstream_worker", verbosity=0)
                finally:
                    os._exit(2)
            return pid

        workers = [begin() for _ in range(3)]
        results, number = [], 0
        for _ in range(kills):
            for _ in range(10):
                results.append(jobs.write.using(priority=number % 20 - 10).enqueue(out, number))
                number += 1
            # The moment of the kill is what varies.
            threading.Event().wait(dice.uniform(0.01, 0.08))
            killed = workers.pop(dice.randrange(3))
            os.kill(killed, signal.SIGKILL)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]), -signal.SIGKILL)
            workers.append(begin())
        for result in results:
            ended = default_task_backend.wait(result.id, timeout=60)
            self.assertEqual(ended.status, SUCCESSFUL, ended)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        ran = [int(line) for line in Path(out).read_text().split()]
        self.assertEqual(set(ran), set(range(number)))
        self.assertEqual(self.waiting(), 0)
        print(kills, "kills,", number, "tasks,", len(ran) - number, "ran twice", file=sys.stderr)


def main():
    runner = DiscoverRunner(verbosity=1)
    cases = [InTestCase, OfBackend, OfTransactions, OfWorker, OfSettings, OfProcesses]
    suite = runner.test_suite()
    for case in cases:
        suite.addTests(runner.test_loader.loadTestsFromTestCase(case))
    runner.setup_test_environment()
    databases = runner.setup_databases()
    result = runner.run_suite(suite)
    runner.teardown_databases(databases)
    bad = [case.id() for case, _ in (*result.failures, *result.errors)]
    print(json.dumps({"ran": result.testsRun, "bad": bad}))


if __name__ == "__main__":
    main()
