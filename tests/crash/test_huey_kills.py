"""Workers and producers of huey, killed by the hundred: no task is lost."""

import json
import subprocess
import sys
from pathlib import Path

import crash_workers as workers
import pytest

pytest.importorskip("huey")

STORM = Path(__file__).with_name("huey_storm.py")


def test_storm_of_kills(tmp_path):
    seed = workers.seed_of("huey_storm")
    command = [sys.executable, STORM, tmp_path, "120", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    assert not done.stderr
    print(done.stdout)
    figures = json.loads(done.stdout)
    assert sum(figures["killed"].values()) == 120
    assert figures["put"] > 100
    assert figures["begun_again"] > 0  # tasks that were in the hands of a worker that was killed
    assert (figures["lost"], figures["dead"], figures["without_result"]) == (0, 0, 0)
