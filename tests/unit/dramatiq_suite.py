"""dramatiq's own tests with our broker and backends, by hand: they are in its sdist alone.

``python tests/unit/dramatiq_suite.py dramatiq-2.2.0`` with the unpacked sdist, or a checkout, which
has more of them, in an environment with pytest. They run in a copy, in which `StubBroker`,
`RedisBroker`, `RabbitmqBroker` and the three kinds of backends are ours. What they check is in
`test_contrib_dramatiq.py` as well, which needs no sdist.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import dramatiq

from millstream.contrib.dramatiq import (
    MillstreamBroker,
    MillstreamRateLimiterBackend,
    MillstreamResultBackend,
)

LEFT_OUT = {
    "test_rabbitmq.py": "of pika and its server, but for what test_redis.py has too",
    "test_watch.py": "of the command line, and slow",
}
OF_OTHERS = (
    # They look into the memory of StubBroker: its `queues` are those of the standard library.
    "test_stub_broker_can_be_flushed",
    "test_stub_broker_respects_prefetch",
    "test_actors_can_be_sent_messages",
    # They look into Redis, or are about its connections and scripts.
    "test_redis_unacked_messages_can_be_requeued",
    "test_redis_messages_can_be_dead_lettered",
    "test_redis_dead_lettered_messages_are_cleaned_up",
    "test_redis_messages_belonging_to_missing_actors_are_rejected",
    "test_redis_requeues_unhandled_messages_on_shutdown",
    "test_redis_requeues_unhandled_delay_messages_on_shutdown",
    "test_redis_broker_can_connect_via",
    "test_redis_consumer_ack_can_retry",
    "test_redis_consumer_nack_can_retry",
    "test_redis_join_race_condition",
    # They ask for RabbitmqBroker or RedisBroker by their names.
    "test_broker_uses_rabbitmq_if_not_set",
    "test_can_instantiate_brokers_without_middleware",
)

CONFTEST = """
import logging
import sys

import dramatiq
import pytest
from dramatiq import Worker
from dramatiq_suite import RateLimits, Results, StubBroker, worker

logging.basicConfig(level=logging.INFO)


@pytest.fixture(name="path")
def _path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def stub_broker(path):
    broker = StubBroker(path)
    broker.emit_after("process_boot")
    dramatiq.set_broker(broker)
    yield broker
    broker.flush_all()
    broker.close()


@pytest.fixture
def redis_broker(stub_broker):
    stub_broker.fails_fast = False
    return stub_broker


@pytest.fixture
def stub_worker(stub_broker):
    with worker(stub_broker, worker_timeout=100, worker_threads=32) as running:
        yield running


@pytest.fixture
def redis_worker(redis_broker):
    with worker(redis_broker, worker_threads=32) as running:
        yield running


@pytest.fixture
def info_logging():
    logging.getLogger().setLevel(logging.INFO)
    yield
    logging.getLogger().setLevel(logging.DEBUG)


@pytest.fixture
def rate_limiter_backend(path):
    backend = RateLimits(path)
    yield backend
    backend.close()


@pytest.fixture
def stub_rate_limiter_backend(rate_limiter_backend):
    return rate_limiter_backend


@pytest.fixture
def result_backend(path):
    backend = Results(path)
    yield backend
    backend.close()


redis_result_backend = stub_result_backend = result_backend


@pytest.fixture
def start_cli():
    import subprocess

    started = []

    def run(broker_module, *, extra_args=None, **options):
        command = [sys.executable, "-m", "dramatiq", broker_module, *(extra_args or [])]
        started.append(subprocess.Popen(command, bufsize=0, **options))
        return started[0]

    yield run
    for process in started:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
"""
COMMON = """
import pytest
from dramatiq_suite import worker

RABBITMQ_CREDENTIALS = None


def skip_in_ci(test):
    return test


skip_on_windows = skip_on_pypy = skip_with_gevent = skip_in_ci
skip_without_gevent = pytest.mark.skip("of gevent")
"""

RateLimits, Results = MillstreamRateLimiterBackend, MillstreamResultBackend


class StubBroker(MillstreamBroker):
    """Ours, which fails fast where its users expect it: in tests."""

    fails_fast = True

    def __init__(self, path=None, **options):
        super().__init__(path or os.environ["SUITE_STORE"], durability="process", **options)

    def join(self, queue_name, *, fail_fast=None, **options):
        super().join(
            queue_name, fail_fast=self.fails_fast if fail_fast is None else fail_fast, **options
        )


class worker:
    """A worker that runs in a `with`."""

    def __init__(self, *arguments, **options):
        self._worker = dramatiq.Worker(*arguments, **options)

    def __enter__(self):
        self._worker.start()
        return self._worker

    def __exit__(self, *raised):
        self._worker.stop()


def copy(source, directory):
    """The tests, with our classes for theirs."""
    shutil.copytree(source / "tests", directory / "tests")
    for path in (directory / "tests").rglob("*.py"):
        text = path.read_text()
        for theirs in ("redis import RedisBroker", "stub import StubBroker"):
            imported = f"from dramatiq.brokers.{theirs}"
            text = text.replace(imported, "from dramatiq_suite import StubBroker")
        text = text.replace("from dramatiq.brokers.redis import MAINTENANCE_SCALE, RedisBroker", "")
        path.write_text(text.replace("RedisBroker(", "StubBroker("))
    (directory / "tests" / "__init__.py").touch()
    (directory / "tests" / "conftest.py").write_text(CONFTEST)
    (directory / "tests" / "common.py").write_text(COMMON)


def main(source, *options):
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        copy(source, directory)
        here = str(Path(__file__).parent)
        paths = [here, str(directory), *filter(None, sys.path)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SUITE_STORE": f"{scratch}/cli"}
        left_out = [f"--ignore=tests/{name}" for name in (*LEFT_OUT, "benchmarks")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
        chosen = ["-k", " and ".join(f"not {name}" for name in OF_OTHERS)]
        return subprocess.call([*command, *left_out, *chosen, *options], cwd=directory, env=env)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
