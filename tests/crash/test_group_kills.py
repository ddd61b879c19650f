"""Members of a group are killed and stopped at any instruction; no record is left out by it."""

import itertools
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import crash_workers as workers
import pytest
from timing import SOON, until

import millstream

WORKERS = Path(__file__).with_name("group_workers.py")
PARTITIONS = 6


def start(*arguments, log):
    command = [sys.executable, str(WORKERS), *map(str, arguments)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE)


def kill(process):
    process.kill()
    process.wait(30)
    assert process.stderr.read() == b""
    process.stderr.close()


def history(paths, kind):
    """The lines of one kind, as numbers; a line that a kill cut short is none."""
    lines = (line for path in paths for line in path.read_text().splitlines(keepends=True))
    return [
        tuple(map(int, line.split()[1:]))
        for line in lines
        if line.startswith(kind) and line.endswith("\n")
    ]


def storm(store, tmp_path, delivery, seed, rounds):
    """Kill, stop and resume consumers while records come; the logs of what they did."""
    rng = random.Random(seed)
    stream = store.stream("s", partitions=PARTITIONS)
    running, stopped, logs = [], [], []
    counts = defaultdict(int)
    turns = itertools.count()
    enough = delivery != "at_least_once"
    while (turn := next(turns)) < rounds or not enough:
        # A slow machine commits less in a round, and goes on for longer.
        enough = enough or (turn % 10 == 0 and len(history(logs, "-")) > 100)
        while len(running) < 4:
            log = tmp_path / f"log-{len(logs)}"
            logs.append(log)
            with open(log, "wb") as out:
                running.append(start("consume", store.path, delivery, 0.3, log=out))
        for partition in range(PARTITIONS):
            values = [b"%d" % turn] * rng.randrange(60)
            if values:
                stream.append_many(values, partition=partition)
        time.sleep(rng.uniform(0.02, 0.12))  # the moment of the kill is what varies
        what = rng.random()
        if what < 0.6:
            kill(running.pop(rng.randrange(len(running))))
            counts["kills"] += 1
        elif what < 0.8 and len(stopped) < 2:
            process = running.pop(rng.randrange(len(running)))
            process.send_signal(signal.SIGSTOP)
            stopped.append(process)
            counts["stops"] += 1
        elif stopped:
            process = stopped.pop(0)
            process.send_signal(signal.SIGCONT)
            running.append(process)
            counts["resumed"] += 1
    for process in running + stopped:
        kill(process)
    return stream, logs, counts


def test_kills_and_stops_leave_out_no_record_and_nobody_commits_out_of_turn(tmp_path):
    seed = workers.seed_of("group_kills")
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream, logs, counts = storm(store, tmp_path, "at_least_once", seed, 100)
        handed, committed = history(logs, "?"), history(logs, "-")
        refused = history(logs, "!")
        with stream.consumer(group="g") as last:
            while (batch := last.poll(0.5)) is not None:
                fence = last._member.fence_of(batch.partition)
                handed.append((batch.partition, fence, batch.first_offset, batch.next_offset))
            last.commit()
        stream.group("g")._check()
        assert stream.group("g").lag() == 0
        records = dup = 0
        for partition in range(PARTITIONS):
            end = stream.next_offset(partition)
            seen = [0] * (end + 1)
            by_fence = sorted(line[1:] for line in handed if line[0] == partition)
            for _, first, following in by_fence:
                for offset in range(first, following):
                    seen[offset] += 1
            missing = [offset for offset in range(end) if not seen[offset]]
            assert missing == []
            records += end
            dup += sum(seen) - end
            # By fence, which is the order of the owners, positions never go back.
            commits = sorted(line[1:] for line in committed if line[0] == partition)
            offsets = [offset for _, offset in commits]
            assert offsets == sorted(offsets)
            # Who comes later begins where the one before it had committed, or behind.
            for fence, first, _ in by_fence:
                assert first >= max((o for f, o in commits if f < fence), default=0)
    print(
        f"records={records} kills={counts['kills']} stops={counts['stops']} commits="
        f"{len(committed)} fenced={len(refused)} lost=0 dup={dup} seed={seed}"
    )
    assert counts["kills"] > 30
    assert len(committed) > 100


def test_at_most_once_hands_nothing_out_twice_whoever_is_killed(tmp_path):
    seed = workers.seed_of("group_kills_at_most_once")
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream, logs, counts = storm(store, tmp_path, "at_most_once", seed, 50)
        handed = history(logs, "?")
        with stream.consumer(group="g", delivery="at_most_once") as last:
            while (batch := last.poll(0.5)) is not None:
                handed.append((batch.partition, 0, batch.first_offset, batch.next_offset))
        total = seen = 0
        for partition in range(PARTITIONS):
            spans = sorted(line[2:] for line in handed if line[0] == partition)
            for (_, end), (first, _) in pairwise(spans):
                assert first >= end
            total += stream.next_offset(partition)
            seen += sum(end - first for first, end in spans)
    # A kill loses what was handed out and not yet written down: a batch at most.
    print(f"records={total} kills={counts['kills']} lost={total - seen} dup=0 seed={seed}")
    assert total - seen <= 20 * (counts["kills"] + counts["stops"] + 4)


@pytest.mark.slow
def test_kills_in_the_middle_of_commits_leave_whole_positions_and_a_free_word(tmp_path):
    rng = random.Random(workers.seed_of("group_commits_killed"))
    kills = held = 0
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("s", partitions=3)
        for partition in range(3):
            stream.append_many([b"a", b"b"] * 500, partition=partition)
        running = []
        for turn in range(40):
            while len(running) < 3:
                log = tmp_path / f"log-{turn}-{len(running)}"
                with open(log, "wb") as out:
                    running.append((start("hammer", store.path, log=out), log))
            victim, log = running.pop(rng.randrange(len(running)))
            until(log.read_bytes)
            time.sleep(rng.uniform(0.0, 0.02))  # the moment of the kill is what varies
            kill(victim)
            kills += 1
            group = stream.group("g")
            held += group._word_owner != 0
            for position in group.positions().values():
                assert position is None or 0 <= position.offset <= 1000
        for process, _ in running:
            kill(process)
        began = time.monotonic()
        with stream.consumer(group="g") as last:
            assert last.assignment == [0, 1, 2]
        assert time.monotonic() - began < SOON  # not the session of those that were killed
        stream.group("g")._check()
    print(f"kills={kills} word_seen_held={held} torn=0")


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_partitions_of_a_dead_member_are_taken_over_at_once_of_a_stopped_one_in_time(tmp_path, how):
    times = []
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("s", partitions=2)
        with stream.consumer(group="g") as mine:
            for turn in range(3):
                with open(tmp_path / f"log-{turn}", "wb") as out:
                    session = 300 if how == "kill" else 0.5
                    other = start("consume", store.path, "at_least_once", session, log=out)
                until(lambda: mine.poll() is None and len(mine.assignment) == 1)
                # The other has taken its partition up, and has nothing in hand.
                [theirs] = {0, 1} - set(mine.assignment)
                stream.append(b"theirs", partition=theirs)
                until(lambda theirs=theirs: not stream.group("g").lag(theirs))
                other.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                began = time.monotonic()
                stream.append(b"mine now", partition=theirs)
                batch = mine.poll(200)
                times.append(time.monotonic() - began)
                assert list(batch.values) == [b"mine now"]
                mine.commit()
                kill(other)
    print(f"{how}: taken over after {', '.join(f'{t * 1000:.0f} ms' for t in times)}")
    assert max(times) < SOON  # of the killed one: not its session of five minutes
    if how == "stop":
        assert min(times) > 0.1
