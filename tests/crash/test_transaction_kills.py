"""Kills of committers, appliers and openers: every input's effect exactly once, by content.

MILLSTREAM_FULL=1: 600 kills of workers at each level, and a kill at every line that a commit runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import crash_workers as workers
import pytest

HERE = Path(__file__).parent
FULL = bool(os.environ.get("MILLSTREAM_FULL"))


def run(program, *arguments):
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("level", ["process", "interval"])
def test_storm_over_consume_process_produce_and_acknowledge(tmp_path, level):
    seed = workers.seed_of(f"transaction_storm_{level}")
    told = run("transaction_storm.py", tmp_path / "store", level, 600 if FULL else 50, seed)
    assert "lost=0 twice=0" in told


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("level", ["process", "interval"])
@pytest.mark.parametrize("live", [1, 0])
def test_kill_at_each_line_of_a_commit(level, live):
    """Another process that lives, or the next first opener, finishes it or undoes it."""
    seed = workers.seed_of(f"transaction_steps_{level}_{live}")
    told = run("transaction_steps.py", live, level, seed, 1 if FULL else 97)
    counts = dict(part.split("=") for part in told.split())
    assert int(counts["committed"]) > 0
    assert int(counts["undone"]) > 0
