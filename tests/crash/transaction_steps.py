"""Kill a committer at each line of Python that it runs, and look what others find.

`python transaction_steps.py LIVE LEVEL SEED STRIDE`: a process of its own, which forks the one that
is to be killed; a line of counts at the end. With LIVE 1 another process, this one, has the store
open meanwhile; with 0 none has, and the next open is a first one.
"""

import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import millstream

KILLED = 9
PACKAGE = os.path.dirname(millstream.__file__)


def kill_at(line):
    """End this process as by SIGKILL when it runs that many lines of the package; count them."""
    count = [0]

    def local(frame, event, arg):
        if event == "line":
            count[0] += 1
            if count[0] == line:
                os._exit(KILLED)
        return local

    def every(frame, event, arg):
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(every)
    return count


def forked(function):
    """Run it in another process; its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(path, level):
    with millstream.open(path, durability=level) as store:
        store.stream("in").append_many([b"a"])
        store.stream("out", partitions=2)
        store.queue("jobs", lease=60.0, ordering="key").put(b"job", key=b"k")
        store.queue("next", ordering="key", dedup_window=60.0)
        with store.transaction() as tx:  # so that the journal, and all that is made once, is there
            tx.append_many(store.stream("out"), [b"0", b"0"], keys=[b"1", b"0"])
            tx.put(store.queue("next"), b"0", key=b"z")


def commit(path, level, line):
    """The transaction that is killed; at line 0 it is not, and the lines are counted."""
    store = millstream.open(path, durability=level)
    out, jobs, following = store.stream("out"), store.queue("jobs"), store.queue("next")
    consumer = store.stream("in").consumer("g", delivery="exactly_once", timeout=0)
    deadline = time.monotonic() + 20
    while (batch := consumer.poll(0.1)) is None:
        if time.monotonic() > deadline:
            return 2
    message = jobs.get(timeout=60)
    tx = store.transaction().__enter__()
    tx.append_many(out, [b"a1", b"a2"], partition=0)
    tx.append_many(out, list(batch.values), keys=[b"k"], partition=1)
    tx.put(following, b"n1", key=b"k", dedup_id="n1")
    tx.put(following, b"n2", key=b"k")
    tx.put(following, b"late", delay=0.01, headers={"h": b"v"})
    tx.ack(message)
    tx.commit(consumer)
    count = kill_at(line)
    tx.__exit__(None, None, None)
    sys.settrace(None)
    if line == 0:
        Path(f"{path}.lines").write_text(str(count[0]))
    os._exit(0 if line == 0 else 3)


def outcome(store, first):
    """Was it committed? What one looks at first differs; then all must say the same."""
    jobs, following = store.queue("jobs"), store.queue("next")
    consumer = store.stream("in").consumer("g", delivery="exactly_once", timeout=0)

    def by_group():
        # Until its former owner is known to be dead there is nothing to read.
        deadline = time.monotonic() + 10
        while not consumer.assignment or consumer.group._pending(0) is not None:
            consumer.poll(0.01)
            assert time.monotonic() < deadline
        return consumer.poll(0) is None and consumer.position[0].offset == 1 and (
            consumer.committed[0] is not None
        )  # fmt: skip

    def by_queue():
        deadline = time.monotonic() + 10
        while True:
            counts = jobs._counts()
            if counts["acking"] == 0 and counts["leased"] == 0:
                return len(jobs) == 0
            jobs._upkeep()
            os.sched_yield()
            assert time.monotonic() < deadline, counts

    def by_next():
        deadline = time.monotonic() + 10
        while following._counts()["prepared"]:
            following._upkeep()
            os.sched_yield()
            assert time.monotonic() < deadline
        return len(following) == 4

    def by_transaction():
        with store.transaction() as tx:
            tx.append(store.stream("other"), b"x")
        return None

    looks = [by_group, by_queue, by_next, by_transaction]
    looks = looks[first:] + looks[:first]
    said = [look() for look in looks]
    said = {one for one in said if one is not None}
    counts = tuple(store.stream("out").next_offset(p) for p in range(2))
    assert len(said) == 1, (said, counts)
    [committed] = said
    assert counts == ((3, 2) if committed else (1, 1)), (committed, counts)
    consumer.close()
    jobs._check()
    following._check()
    return committed


def judge(store, first):
    committed = outcome(store, first)
    out, jobs, following = store.stream("out"), store.queue("jobs"), store.queue("next")
    with store.stream("in").consumer("g", delivery="exactly_once", timeout=0) as consumer:
        if not committed:  # do it again: it must be possible
            with store.transaction() as tx:
                deadline = time.monotonic() + 10
                while consumer.poll(0.05) is None:
                    assert time.monotonic() < deadline
                tx.append_many(out, [b"a1", b"a2"], partition=0)
                tx.append_many(out, [b"a"], keys=[b"k"], partition=1)
                tx.put(following, b"n1", key=b"k", dedup_id="n1")
                tx.put(following, b"n2", key=b"k")
                tx.put(following, b"late", delay=0.01, headers={"h": b"v"})
                tx.ack(jobs.get(timeout=60))
                tx.commit(consumer)
        assert consumer.poll(0) is None
    rows = [
        (value, key)
        for p in range(2)
        for batch in out.read(partition=p)
        for value, key in zip(batch.values, batch.keys, strict=True)
    ]
    assert sorted(rows, key=repr) == sorted(
        [(b"0", b"1"), (b"0", b"0"), (b"a1", None), (b"a2", None), (b"a", b"k")], key=repr
    ), rows
    following.put(b"never", key=b"k", dedup_id="n1")
    found = []
    while len(found) < 4:
        with following.get(timeout=60) as m:
            found.append((m.value, m.headers))
    assert [v for v, _ in found if v[:1] == b"n"] == [b"n1", b"n2"]
    assert sorted(found)[:2] == [(b"0", {}), (b"late", {"h": b"v"})]
    assert len(jobs) == len(following) == 0
    return committed


def main(live, level, seed, stride):
    dice = random.Random(seed)
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    root = Path(tempfile.mkdtemp(prefix="millstream-steps-", dir=shm))
    kills = committed = again = 0
    try:
        prepare(root / "count", level)
        status = forked(lambda: commit(root / "count", level, 0))
        assert status == 0, status
        lines = int(Path(f"{root / 'count'}.lines").read_text())
        for line in range(1 + dice.randrange(stride), lines + 1, stride):
            path = root / f"s{line}"
            prepare(path, level)
            first = line % 4
            store = millstream.open(path, durability=level) if live else None
            if store is not None:
                store.queue("jobs"), store.queue("next")
            status = forked(lambda path=path, line=line: commit(path, level, line))
            assert status == KILLED, (line, status)
            kills += 1
            # Now and then who comes next is killed as well, anywhere.
            for _ in range(dice.choice((0, 0, 1, 2))):
                at = round(dice.random() ** 2 * 6000) + 1

                def next_one(path=path, at=at, first=first):
                    kill_at(at)
                    outcome(millstream.open(path, durability=level), first)

                again += forked(next_one) == KILLED
            if store is None:
                store = millstream.open(path, durability=level)
            try:
                committed += judge(store, first)
            except BaseException:
                print(f"line={line} first={first}", file=sys.stderr)
                raise
            store.close()
            with millstream.open(path, mode="r") as closed:
                assert not closed.needs_recovery
            shutil.rmtree(path)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"lines={lines} kills={kills} committed={committed} undone={kills - committed}"
          f" killed_while_settling={again} seed={seed}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1] == "1", sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
