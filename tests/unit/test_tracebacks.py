"""The tracebacks of dead letters: they go with their letters, and no other does."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import millstream


def dead_of(queue, *texts):
    """Ids of messages that died of errors with these texts."""
    ids = []
    for text in texts:
        ids.append(queue.put(text.encode()))
        with pytest.raises(RuntimeError), queue.get(timeout=5):
            raise RuntimeError(f"the error of {text}")
    return ids


def kept_in(directory):
    """All that the files of tracebacks say."""
    return "".join(file.read_text() for file in directory.rglob("*traceback*"))


ONCE = millstream.RetryPolicy(max_attempts=1)
REMOVE = {
    "purge": lambda dead, ids: dead.purge(ids),
    "redrive": lambda dead, ids: dead.redrive(ids),
}


@pytest.mark.parametrize("how", REMOVE)
def test_a_dead_letter_that_goes_takes_its_traceback_along(store, how, monkeypatch):
    monkeypatch.setattr("millstream.queues.tracebacks.FILE_MAX", 1500)  # two or so
    queue = store.queue("mail", retry=ONCE)
    ids = dead_of(queue, *map(str, range(100, 109)))
    gone = ids[::2]
    assert REMOVE[how](queue.dead, gone) == 5
    directory = Path(store.path)
    for index, number in enumerate(ids):
        assert (f"the error of {100 + index}" in kept_in(directory)) == (number not in gone)
    letters = queue.dead.list()
    assert [f"error of {one.value.decode()}\n" in one.traceback for one in letters] == [True] * 4
    with queue.get(timeout=5) if how == "redrive" else contextlib.nullcontext():
        pass
    assert REMOVE[how](queue.dead, None) == 4
    assert kept_in(directory) == ""


def test_a_message_that_dies_again_keeps_its_last_traceback(store):
    queue = store.queue("mail", retry=ONCE)
    dead_of(queue, "one")
    queue.dead.redrive()
    with pytest.raises(ValueError), queue.get(timeout=5):
        raise ValueError("another one")
    (letter,) = queue.dead.list()
    assert letter.traceback.endswith("ValueError: another one\n")
    assert "the error of one" not in kept_in(Path(store.path))


PURGE = """
import os, signal, sys, millstream
from millstream.disk import files

def deadly(call):
    def called(*words):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*words)
    return called

path, left, *ids = sys.argv[1], *map(int, sys.argv[2:])
dead = millstream.open(path).queue("mail").dead
for name in ("write", "sync", "rename", "remove"):
    setattr(files, name, deadly(getattr(files, name)))
dead.purge(ids)
"""


def test_kills_while_tracebacks_are_erased(tmp_path, monkeypatch):
    monkeypatch.setattr("millstream.queues.tracebacks.FILE_MAX", 1500)
    code, left = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        path = tmp_path / f"store{left}"
        with millstream.open(path, durability="process") as store:
            ids = dead_of(store.queue("mail", retry=ONCE), *map(str, range(100, 106)))
        command = [sys.executable, "-c", PURGE, str(path), str(left), *map(str, ids[::2])]
        code = subprocess.run(command).returncode
        with millstream.open(path) as store:
            dead = store.queue("mail").dead
            for letter in dead.list():
                assert f"the error of {letter.value.decode()}\n" in letter.traceback, (
                    left,
                    letter.value,
                )
            dead.purge(ids[::2])
            assert [one.id for one in dead.list()] == ids[1::2]
            assert sorted(re.findall(r"the error of (\d+)\\n", kept_in(path))) == [
                "101",
                "103",
                "105",
            ]
        left += 1
    assert code == 0 and left > 3


def test_tracebacks_are_kept_while_others_are_erased(store):
    queue = store.queue("mail", retry=ONCE, capacity=1000)
    over = threading.Event()

    def purge():
        while not over.is_set():
            queue.dead.purge([one.id for one in queue.dead.list() if one.value == b"gone"])

    eraser = threading.Thread(target=purge)
    eraser.start()
    try:
        for _ in range(60):
            dead_of(queue, "gone", "kept")
    finally:
        over.set()
        eraser.join()
    kept = [one for one in queue.dead.list() if one.value == b"kept"]
    assert len(kept) == 60
    assert all("the error of kept" in one.traceback for one in kept)
