"""Processes of a queue, killed and stopped by the hundred: nothing lost or twice, no slot gone.

MILLSTREAM_FULL=1: a thousand kills and a million messages.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import crash_workers as workers
import pytest
import queue_storm as storm

STORM = Path(__file__).with_name("queue_storm.py")
SIZES = {  # kills, messages, seconds between the blows at most
    False: {"any order": (100, 60_000, 0.12), "order by key": (60, 20_000, 0.12)},
    True: {"any order": (750, 850_000, 0.08), "order by key": (350, 250_000, 0.08)},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["any order", "order by key"])
def test_storm_of_kills_and_pauses(tmp_path, kind):
    seed = workers.seed_of(f"queue_storm, {kind}")
    kills, messages, pace = SIZES[bool(os.environ.get("MILLSTREAM_FULL"))][kind]
    options = {
        "seed": seed, "kills": kills, "messages": messages, "pace": pace,
        "ordered": kind == "order by key",
    }  # fmt: skip
    command = [sys.executable, str(STORM), str(tmp_path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert not done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] >= kills
    assert figures["put"] >= messages
    assert min(figures[what] for what in ("ack", "nack", "release", "extend", "pauses")) > 0
    faults = figures["kills"] + figures["pauses"]
    workers.report(figures["leases"], faults, seed, figures["lost"], figures["again"])
    print(figures)


# --- the judge itself -----------------------------------------------------------------------------

MS = 1_000_000
ONE, TWO, OTHER = 1 << 32, 1 << 32 | 1, 2 << 32
GOOD = {  # two messages of one key put by worker 1, taken and acknowledged by workers 3 and 4
    1: [(storm.PUTTING, ONE, 0, 2, 0), (storm.PUT, ONE, 5, 2, 0)],
    3: [
        (storm.TAKEN, ONE, 10 * MS, 11 * MS, 7 << 56 | 100),
        (storm.ENDING, ONE, 20 * MS, storm.ACK, 0),
        (storm.ENDED, ONE, 21 * MS, storm.ACK, storm.OK),
    ],
    4: [
        (storm.TAKEN, TWO, 30 * MS, 31 * MS, 7 << 56 | 101),
        (storm.ENDING, TWO, 40 * MS, storm.ACK, 0),
        (storm.ENDED, TWO, 41 * MS, storm.ACK, storm.OK),
    ],
}
FAULTS = {
    "lost": {4: []},
    "that nobody put": {4: [*GOOD[4], (storm.TAKEN, OTHER, 50 * MS, 51 * MS, 7 << 56 | 102)]},
    "finished twice": {5: [(op, n, at + 500 * MS, a, b) for op, n, at, a, b in GOOD[3]]},
    "delivered again": {5: [(storm.TAKEN, ONE, 500 * MS, 501 * MS, 7 << 56 | 100)]},
    "under a live lease": {5: [(storm.TAKEN, ONE, 12 * MS, 13 * MS, 7 << 56 | 100),
                               (storm.ENDING, ONE, 13 * MS, storm.NACK, 0)]},
    "two live leases": {5: [(storm.TAKEN, ONE, 12 * MS, 13 * MS, 7 << 56 | 100)]},
    "before one ahead": {4: [(storm.TAKEN, TWO, 12 * MS, 13 * MS, 7 << 56 | 101), *GOOD[4][1:]]},
}  # fmt: skip


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_judge_of_the_storm_catches_a_planted(tmp_path, fault):
    judged = storm.Storm(tmp_path, {"seed": 0, "ordered": True})
    for worker, records in (GOOD | FAULTS.get(fault, {})).items():
        storm.Account(judged.accounts, worker).say(*records)
    if fault is None:
        assert storm.Judge(judged).judge([])["ack"] == 2
        return
    with pytest.raises(AssertionError, match=fault):
        storm.Judge(judged).judge([])
