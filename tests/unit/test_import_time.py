"""`import millstream` is cheap: what it costs over a bare interpreter, and what it leaves alone."""

import os
import re
import subprocess
import sys

LIMIT_MS = 15.0
LAZY = ("numpy", "xxhash", "asyncio", "multiprocessing", "logging", "tempfile", "rich", "pyarrow")


def run(*arguments):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # measured as it is when installed
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )


def own_times(statement):
    """Name to milliseconds of each module that the statement makes the interpreter import."""
    lines = run("-X", "importtime", "-c", statement).stderr.splitlines()
    found = [re.match(r"import time: +(\d+) \| +\d+ \| +(\S+)", line) for line in lines]
    return {match[2]: int(match[1]) / 1000 for match in found if match}


def test_import_costs_less_than_15_ms():
    run("-c", "import millstream")  # the bytecode is there from now on
    bare = own_times("pass")
    # The least of several: what disturbs a run only ever adds.
    costs = []
    for _ in range(9):
        added = own_times("import millstream")
        costs.append(sum(time for name, time in added.items() if name not in bare))
    assert min(costs) < LIMIT_MS, sorted(costs)


def test_import_leaves_heavy_modules_alone():
    program = f"import millstream, sys; print([m for m in {LAZY!r} if m in sys.modules])"
    assert run("-c", program).stdout == "[]\n"
