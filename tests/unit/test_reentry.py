"""Calls from signal handlers and finalizers, in the middle of other calls of the same thread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import reentry_calls

SEED = int(os.environ.get("MILLSTREAM_SEED", "1"))
POINTS = int(os.environ.get("MILLSTREAM_REENTRY_POINTS", "5"))


@pytest.mark.parametrize("outer", reentry_calls.CALLS)
def test_any_call_may_interrupt_any_call(outer):
    """At lines all over a call every other one is made: it works, or says why not, at once."""
    print("seed", SEED)
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("reentry_calls.py"), outer, str(POINTS),
         str(SEED)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-6000:]


@pytest.mark.parametrize("kind", ["signals", "finalizers"])
def test_calls_at_any_instruction(kind):
    """A timer's handler, and `__del__` at nearly any allocation, make calls of every kind."""
    print("seed", SEED)
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning",
         Path(__file__).with_name("reentry_storm.py"), kind, "100", str(SEED)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-6000:]
