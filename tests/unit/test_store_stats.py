"""A store in numbers for who asks every second, and who has it open."""

import cProfile
import dataclasses
import json
import os
import pstats
import subprocess
import sys
import time

import pytest

import millstream
from millstream.cli import main
from millstream.errors import CorruptBatch


def without_files(stats):
    """A spare segment may come at any moment."""
    return [dataclasses.replace(part, allocated_bytes=0) for part in stats.partitions]


def filled(store, partitions=3):
    events = store.stream("events", partitions=partitions)
    old = int((time.time() - 100) * 1e6)
    for index in range(partitions - 1):
        events.append_many([b"a", b"b"], partition=index, timestamps=[old, old + 40_000_000])
    with events.consumer("readers", max_records=1) as consumer:
        consumer.poll()
        consumer.commit()
    mail = store.queue("mail")
    mail.put_many([b"x", b"y"])
    return events, mail


def test_it_says_what_each_says_by_itself(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        events, mail = filled(store)
        store.flush()  # what is durable is the same at both looks
        for mode in ("rw", "r"):
            with millstream.open(tmp_path / "store", mode=mode) as other:
                found = other.stats()
                assert (found.path, found.durability) == (str(tmp_path / "store"), "interval")
                assert [one.name for one in found.streams] == ["events"]
                assert found.streams[0].partitions == events.stats().partitions
                ages = [part.oldest_age for part in found.streams[0].partitions]
                assert ages == [pytest.approx(100, abs=20), pytest.approx(100, abs=20), None]
                (group,) = found.groups
                assert (group.stream, group.name, group.health) == ("events", "readers", "sound")
                assert (group.lag, group.members) == (3, ())
                assert group.lag_seconds == pytest.approx(100, abs=20)
                lags = sorted(part.lag_seconds for part in group.partitions)
                assert lags == [0.0, pytest.approx(60, abs=20), pytest.approx(100, abs=20)]
                (queue,) = found.queues
                expected = dataclasses.replace(mail.stats(), oldest_age=queue.oldest_age)
                assert queue == expected
                assert found.health == "sound"
                assert found.members == (2 if mode == "rw" else 1)


def test_it_follows_what_others_do(tmp_path):
    with millstream.open(tmp_path / "store") as store, millstream.open(tmp_path / "store") as other:
        events, _ = filled(store)
        other.stats()
        for _ in range(5):
            events.append_many([b"x" * 1000] * 2000, partition=0)
        store.queue("new").put(b"x")
        events.add_partitions(1)
        store.flush()
        found = other.stats()
        ours, theirs = (without_files(one) for one in (events.stats(), found.streams[0]))
        assert ours == theirs
        assert found.streams[0].partitions[0].segments > 1
        assert [one.name for one in found.queues] == ["mail", "new"]
        store.drop_stream("events")
        store.drop_queue("new")
        found = other.stats()
        assert (found.streams, found.groups, len(found.queues)) == ((), (), 1)


def test_a_group_with_a_damaged_position_is_said_to_be_corrupt(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        filled(store)
    with open(tmp_path / "store/streams/events/groups/readers.group", "r+b") as file:
        for partition in range(3):
            file.seek(4096 + 64 * 256 + 192 * partition + 64)
            file.write(b"\xff" * 128)
    with millstream.open(tmp_path / "store") as store:
        (group,) = store.stats().groups
        assert (group.health, group.partitions, group.lag_seconds) == ("corrupt", (), 0.0)
        assert store.stats().health == "corrupt"
        with pytest.raises(CorruptBatch):
            store.stream("events").group("readers").partitions()


def calls(work):
    """Calls of C and Python functions, and of those into the file system, in some work."""
    profile = cProfile.Profile()
    profile.enable()
    work()
    profile.disable()
    stats = pstats.Stats(profile)
    files = sum(
        count
        for (_, _, name), (_, count, *_) in stats.stats.items()
        if "posix." in name or "io.open" in name or "fcntl" in name
    )
    return stats.total_calls, files


def test_what_it_costs_is_counted(tmp_path):
    """A scrape every second: no file is asked about for most of the partitions and queues."""
    with millstream.open(tmp_path / "store", durability="process") as store:
        filled(store, partitions=300)
        for number in range(20):
            store.queue(f"q{number}").put(b"x")
        for _ in range(2):
            store.stats()
        total, files = calls(store.stats)
        assert files < 3 * 30 + 20, files  # three partitions in their turn, and what is once
        assert total < 300 * 20 + 21 * 60, total


def test_who_has_it_open_and_what_each_holds(tmp_path):
    program = f"""
import sys, millstream
store = millstream.open({str(tmp_path / "store")!r})
consumer = store.stream("events").consumer("readers")
consumer.poll()
message = store.queue("mail").get(timeout=5)
print("ready", flush=True)
sys.stdin.read()
"""
    with millstream.open(tmp_path / "store") as store:
        filled(store)
        command = [sys.executable, "-c", program]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
            assert other.stdout.readline() == "ready\n"
            with millstream.open(tmp_path / "store", mode="r") as reader:
                us, them = sorted(reader.processes(), key=lambda one: one.pid != os.getpid())
                assert (us.pid, us.is_here, us.leases, us.partitions) == (os.getpid(), True, {}, {})
                assert us.queues == ("mail",)
                assert (them.pid, them.leases) == (other.pid, {"mail": 1})
                assert them.partitions == {("events", "readers"): (0, 1, 2)}
                assert them.command.startswith(f"{sys.executable} -c import sys")
                assert abs(them.since / 1e6 - time.time()) < 600
                other.kill()
                other.wait()
                assert [one.pid for one in reader.processes()] == [os.getpid()]


def test_ls_and_info_show_groups_and_queues_beside_streams(tmp_path, capsys):
    with millstream.open(tmp_path / "store") as store:
        filled(store)

        def said(*command):
            assert main([command[0], str(tmp_path / "store"), *command[1:]]) == 0
            return capsys.readouterr().out

        rows = {(one["kind"], one["name"]): one for one in json.loads(said("ls", "--json"))}
        assert set(rows) == {("stream", "events"), ("group", "readers"), ("queue", "mail")}
        assert rows["group", "readers"]["lag"] == 3
        assert (rows["queue", "mail"]["ready"], rows["queue", "mail"]["put"]) == (2, 2)
        listed = [line.split()[0] for line in said("ls").splitlines()]
        assert listed == ["Stream", "events", "Group", "readers", "Queue", "mail"]
        found = json.loads(said("info", "--json"))
        assert [one["name"] for one in found["groups"]] == ["readers"]
        assert [one["name"] for one in found["queues"]] == ["mail"]
        assert [one["pid"] for one in found["processes"]] == [os.getpid()]
        shown = said("info")
        assert "readers" in shown and "mail" in shown and str(os.getpid()) in shown
        assert "mail" not in said("info", "events")
