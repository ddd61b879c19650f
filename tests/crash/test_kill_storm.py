"""SIGKILL of writers, openers and all at once: nothing acknowledged is lost or there twice."""

import json
import random

import crash_workers as workers
import pytest


@pytest.fixture
def history(tmp_path):
    directory = tmp_path / "history"
    directory.mkdir()
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partitions", "durability"), [(1, "process"), (3, "process"), (1, "interval"), (2, "sync")]
)
def test_writers_killed_while_others_go_on(tmp_path, history, partitions, durability):
    seed = workers.seed_of("writers_killed") + partitions
    dice = random.Random(seed)
    store = str(tmp_path / "store")
    options = {"partitions": partitions, "durability": durability}
    kills, names = 0, iter(range(10_000))

    def writer():
        return workers.start(
            "write_for_ever", store, str(history), f"w{next(names)}", seed, options
        )

    first = writer()
    running = [first]
    assert workers.line(first) == "open"  # the stream is there
    readers = [workers.start("read_for_ever", store, index) for index in range(partitions)]
    running += [writer() for _ in range(3)]
    while kills < 30:
        victim = running.pop(dice.randrange(len(running)))
        if dice.random() < 0.8 and victim is not first:
            assert workers.line(victim) == "open"  # else: perhaps in the middle of opening
        wait_bytes = dice.randrange(20_000)
        before = size_of(history)
        workers.until(
            lambda b=before, w=wait_bytes: size_of(history) >= b + w, "progress of the others"
        )
        workers.kill(victim)
        kills += 1
        running.append(writer())
    for one in running:
        if one is not first:
            assert workers.line(one) == "open"
    for one in running:
        assert workers.stop(one) == 0
    counts = []
    for reader in readers:
        workers.line(reader)
        reader.stdin.close()
        counts.append(int(workers.line(reader)))
        assert workers.stop(reader) == 0
    records, _ = workers.judge(store, history)
    assert sum(counts) <= records
    workers.verified(store)
    workers.report(records, kills, seed)


def size_of(directory):
    return sum(path.stat().st_size for path in directory.glob("*.history"))


def test_all_killed_at_once_then_recovered(tmp_path, history):
    seed = workers.seed_of("all_killed")
    dice = random.Random(seed)
    store = str(tmp_path / "store")
    kills = 0
    for round in range(12):
        running = [
            workers.start(
                "write_for_ever", store, str(history), f"r{round}w{i}", seed, {"partitions": 2}
            )
            for i in range(3)
        ]
        for one in running:
            assert workers.line(one) == "open"
        before, more = size_of(history), dice.randrange(60_000)
        workers.until(lambda b=before, m=more: size_of(history) >= b + m, "progress")
        for one in running:
            one.kill()
        for one in running:
            workers.kill(one)
            kills += 1
    records, _ = workers.judge(store, history)
    workers.verified(store)
    workers.report(records, kills, seed)


def test_opener_killed_inside_recovery(tmp_path, history):
    seed = workers.seed_of("opener_killed")
    dice = random.Random(seed)
    store = str(tmp_path / "store")
    one = workers.start("write_for_ever", store, str(history), "w", seed, {"partitions": 2})
    assert workers.line(one) == "open"
    workers.until(lambda: size_of(history) > 300_000, "progress")
    workers.kill(one)
    kills = 0
    for step in range(40):
        # Each run is killed by strace-free means: a file call of its own, counted down.
        opener = workers.start(
            "test_kill_storm.recover_until", store, step if step < 30 else dice.randrange(60)
        )
        opener.wait(workers.DEADLINE_S)
        kills += opener.returncode == -9
        workers.kill(opener)
    assert kills >= 25
    found = json.loads(workers.run("open_and_recover", store))
    records, _ = workers.judge(store, history)
    assert sum(found) == records
    workers.verified(store)
    workers.report(records, kills, seed)


def recover_until(path, calls):
    """Open and recover a store; die by SIGKILL at a call to the file system."""
    import os
    import signal

    from millstream.disk import files

    left = [calls]

    def counted(function):
        def call(*arguments, **named):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **named)

        return call

    changing = (
        "write",
        "sync",
        "rename",
        "remove",
        "_sync_directory",
        "allocate",
        "close",
        "replace",
    )
    for name in changing:
        setattr(files, name, counted(getattr(files, name)))
    workers.open_and_recover(path)
