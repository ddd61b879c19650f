"""What tests of workers have in common: a quick retry, running all there is, and their notes."""

import subprocess
import sys
from pathlib import Path

import worker_jobs

import millstream

QUICK = millstream.RetryPolicy(max_attempts=2, backoff=0.0)
JOBS = Path(worker_jobs.__file__)
START = """
import sys, threading
sys.path.insert(0, {jobs!r})
import millstream, worker_jobs
from millstream.worker import Worker
"""


def run(queue, function=None, **options):
    """Run a function, or what is registered, over all that is there."""
    if function is not None:
        queue.worker(**options)(function)
    return millstream.run(queue, until_empty=True)


def put_jobs(queue, tmp_path, count):
    where = {"to": str(tmp_path).encode()}
    return queue.put_many([millstream.Put(b"job", headers=where) for _ in range(count)])


def run_script(tmp_path, body, name="script.py"):
    """Run a program that has a store with one message in a queue; what it printed."""
    script = tmp_path / name
    script.write_text(START.format(jobs=str(JOBS.parent)) + body)
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done.stdout, done.stderr
