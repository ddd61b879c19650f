"""Workers and producers of dramatiq, killed by the hundred: no task is lost."""

import json
import subprocess
import sys
from pathlib import Path

import crash_workers as workers
import pytest

pytest.importorskip("dramatiq")

STORM = Path(__file__).with_name("dramatiq_storm.py")
KILLS = 100


def test_storm_of_kills(tmp_path):
    seed = workers.seed_of("dramatiq_storm")
    command = [sys.executable, STORM, tmp_path, str(KILLS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    print(done.stdout)
    figures = json.loads(done.stdout)
    assert sum(figures["killed"].values()) == KILLS
    assert min(figures["killed"].values()) > 0
    assert figures["put"] > 100
    assert figures["begun_again"] > 0  # tasks that were in the hands of a worker that was killed
    assert (figures["lost"], figures["dead"], figures["left"]) == (0, 0, 0)
