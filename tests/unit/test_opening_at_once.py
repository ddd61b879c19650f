"""Processes that all find no store at the same moment all end up in one."""

import subprocess
import sys

import millstream

PROGRAM = """
import sys, millstream
sys.stdin.readline()
with millstream.open(sys.argv[1]) as store:
    print(store.stream("s", partitions=2).append(b"x", partition=1).offset, flush=True)
    sys.stdin.readline()
"""


def test_stores_created_by_six_processes_at_once_are_one(tmp_path):
    for attempt in range(5):
        path = tmp_path / str(attempt)
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(6)
        ]
        for worker in workers:
            worker.stdin.write(b"\n")
            worker.stdin.flush()
        # Nobody leaves before all are in: who creates the store stays a member.
        offsets = [int(worker.stdout.readline()) for worker in workers]
        assert sorted(offsets) == list(range(6))
        for worker in workers:
            worker.communicate(b"\n", timeout=600)
            assert worker.returncode == 0
        with millstream.open(path) as store:
            assert store.stream("s").next_offset(1) == 6
