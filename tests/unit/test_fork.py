"""Forks: what a child may use, what it must leave alone, and that it never waits for its parent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import millstream

HERE = Path(__file__).parent
FORKS = int(os.environ.get("MILLSTREAM_FORKS", "40"))


def in_child(work):
    """Fork, work, end the child in order; its status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(30)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_children_forked_in_the_middle_of_any_call_are_free(tmp_path):
    """Locks that other threads have in the parent are free in the child."""
    ended = subprocess.run(
        [sys.executable, HERE / "fork_calls.py", tmp_path, str(FORKS)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]


def test_view_is_closed_in_a_child(stream):
    stream.append(b"1", key=b"k")
    with stream.view() as view:

        def look():
            for use in (lambda: view[b"k"], lambda: view.get(b"k"), lambda: len(view),
                        lambda: b"k" in view, lambda: dict(view.items())):  # fmt: skip
                with pytest.raises(millstream.Closed, match="fork"):
                    use()
            assert view.closed
            view.close()

        assert in_child(look) == 0
        assert view[b"k"] == b"1"


def segments_of(process):
    """The segments that a process has mapped or open."""
    here = Path(f"/proc/{process}")
    mapped = [line.split()[-1] for line in (here / "maps").read_text().split("\n") if line]
    opened = [os.readlink(one) for one in list((here / "fd").iterdir()) if one.is_symlink()]
    return {name for name in (*mapped, *opened) if name.endswith(".seg")}


def test_child_holds_no_segment_of_its_parent(tmp_path):
    """Retention frees space also where a child lives on."""
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        for _ in range(20):
            stream.append(bytes(30_000))
        list(stream.read())
        assert len(segments_of("self")) >= 10
        ready, said = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(said, b"1")
            signal.pause()
        try:
            os.read(ready, 1)
            # What the background of the parent was just at stays in its stack.
            assert len(segments_of(child)) <= 2
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(ready)
            os.close(said)
        stream.append(b"on")


PARENT = """
import os, sys, time
import millstream
from millstream.worker import Worker
import test_fork

if __name__ == "__main__":
    with millstream.open(sys.argv[1]) as store:
        queue = store.queue("q")
        with Worker(queue, test_fork.job, mode="process", concurrency=2) as worker:
            queue.put_many([b"0"] * 2)
            queue.join(timeout=60)
            before = sorted(worker._running.pids)
            child = os.fork()
            if child == 0:
                sys.exit(0)  # in order: what is to be done at exit is done
            assert os.waitpid(child, 0)[1] == 0
            queue.put_many([b"0"] * 2)
            queue.join(timeout=60)
            assert sorted(worker._running.pids) == before, "the workers were ended"
            print("well")
"""


def job(message):
    """What the workers do."""


def test_child_that_ends_in_order_leaves_the_workers_of_its_parent(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    ended = subprocess.run(
        [sys.executable, program, tmp_path / "store"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert (ended.stdout, ended.returncode) == ("well\n", 0), ended.stderr[-4000:]


def test_locks_of_files_end_with_the_call_also_where_a_child_lives(tmp_path):
    """A child keeps open what a call of its parent had open: no lock may hang on that."""
    with millstream.open(tmp_path / "store") as store:
        stream = store.stream("s")
        from millstream.disk import files

        children = []
        before = files.write

        def write(*arguments):
            if not children and arguments[3].endswith("producers"):
                child = os.fork()
                if child == 0:
                    signal.pause()
                children.append(child)
            return before(*arguments)

        stream.producer(id="a")
        files.write = write
        try:
            stream.producer(id="b")
            begun = time.monotonic()
            with millstream.open(tmp_path / "store") as other:
                other.stream("s").producer(id="c")
            assert children
            assert time.monotonic() - begun < 20
        finally:
            files.write = before
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
