"""Celery under a storm of kills: no task that was sent is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("celery")

SEED = int(os.environ.get("MILLSTREAM_SEED") or 11)
KILLS = 100


def test_a_hundred_kills_lose_no_task(tmp_path):
    print(f"seed {SEED}")
    here = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", str(here / "celery_storm.py"), str(tmp_path)]
    ran = subprocess.run(
        [*command, str(KILLS), str(SEED)], capture_output=True, text=True, timeout=600, check=False
    )
    log = (tmp_path / "log").read_text()[-3000:] if (tmp_path / "log").exists() else ""
    assert ran.returncode == 0, ran.stderr + log
    counts = json.loads(ran.stdout.splitlines()[-1])
    print(counts)
    assert sum(counts["kills"].values()) == KILLS
    assert counts["sent"] > KILLS
    assert counts["lost"] == []
    assert counts["dead"] == 0
