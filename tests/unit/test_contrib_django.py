"""`contrib.django` in a Django project, with the cases of django-tasks' own tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("millstream.contrib.django", exc_type=ImportError)

SUITE = Path(__file__).with_name("django_suite.py")


@pytest.mark.slow
def test_tasks_of_a_project(tmp_path):
    command = [sys.executable, "-W", "error", SUITE, tmp_path]
    done = subprocess.run(command, cwd=SUITE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(done.stderr, counts)
    assert counts["bad"] == [], done.stderr[-10_000:]
    assert counts["ran"] >= 55
