"""Producers and consumers of a queue are killed at any instruction; no message is lost by it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash_workers as workers
import pytest
from timing import SOON, until

import millstream

WORKERS = Path(__file__).with_name("queue_workers.py")


def start(*arguments, log):
    command = [sys.executable, str(WORKERS), *map(str, arguments)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE)


def kill(process):
    process.kill()
    process.wait(30)
    assert process.stderr.read() == b""
    process.stderr.close()


def said(paths, kind):
    found = []
    for path in paths:
        lines = path.read_text().splitlines(keepends=True)
        found += [int(line[2:]) for line in lines if line.startswith(kind) and line.endswith("\n")]
    return found


@contextlib.contextmanager
def logged(tmp_path, name):
    path = tmp_path / name
    with open(path, "ab") as log:
        yield path, log


@pytest.mark.parametrize("how", [signal.SIGKILL])
def test_message_of_a_killed_worker_is_delivered_again_at_once(tmp_path, how):
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q", lease=600)
        q.put(b"1")
        with logged(tmp_path, "holder") as (path, log):
            holder = start("hold", tmp_path / "store", log=log)
            until(lambda: said([path], "?"))
            holder.send_signal(how)
            began = time.monotonic()
            m = q.get(timeout=300)
            took = time.monotonic() - began
            holder.wait(10)
            holder.stderr.close()
        assert m.attempt == 2
        assert took < SOON  # not its lease of ten minutes
        m.ack()
        q._check()


def test_kills_lose_nothing_and_deliver_nothing_twice_that_was_acknowledged(tmp_path):
    rng = random.Random(workers.seed_of("queue_kills"))
    producers, consumers = [], []
    running = []
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q", capacity=5000, retry=millstream.RetryPolicy(max_attempts=60))
        for turn in range(40):
            log = tmp_path / f"log-{turn}"
            with open(log, "wb") as out:
                if turn % 2:
                    consumers.append(log)
                    running.append(start("consume", tmp_path / "store", log=out))
                else:
                    producers.append(log)
                    running.append(start("produce", tmp_path / "store", turn * 10**7, log=out))
            idle = 0 if turn % 2 else 5000  # nothing to take, or no room: it says nothing then
            until(lambda log=log, idle=idle: log.stat().st_size or q.stats().unfinished == idle)
            time.sleep(rng.uniform(0.05, 0.2))  # the moment of the kill is what varies
            while len(running) > 3:
                kill(running.pop(rng.randrange(len(running))))
        for process in running:
            kill(process)
        left = []
        while len(q):
            messages = q.get_many(1000, timeout=60)  # a lost hint is found within two seconds
            assert messages, q.stats()
            left += [int(m.value) for m in messages]
            assert q.ack_many(messages) == []
        q._upkeep()  # where nothing had to be waited for, nobody has swept since the last kill
        stats = q.stats()
        assert (stats.unfinished, stats.dead, q._counts()["writing"]) == (0, 0, 0)
        q._check()
    put, taken, acked = said(producers, "="), said(consumers, "?"), said(consumers, "-")
    assert len(put) > 1000
    assert len(acked) > 500
    assert set(put) <= set(acked) | set(left) | set(taken)
    # Between an acknowledgement and its line in the log a kill may come: one a consumer.
    missing = set(put) - set(acked) - set(left)
    assert len(missing) <= len(consumers)
    assert not set(acked) & set(left)
    assert len(acked) == len(set(acked))
    assert len(left) == len(set(left))


def test_first_open_after_all_were_killed_has_all(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        store.queue("q", capacity=5000)
    with logged(tmp_path, "producer") as (path, log):
        process = start("produce", tmp_path / "store", 0, log=log)
        until(lambda: len(said([path], "=")) >= 500)
        kill(process)
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q")
        q._check()
        found = [int(m.value) for m in q.get_many(6000, timeout=0)]
        put = said([path], "=")
        assert found[: len(put)] == put
        assert len(found) <= len(put) + 1


def test_forked_child_must_open_again(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q")
        q.put(b"x")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                q.get(timeout=0)
            except millstream.Closed:
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert q.get(timeout=0).value == b"x"
