"""A storm over one queue: processes that put, take and finish are killed and stopped at any moment.

`python queue_storm.py DIRECTORY JSON` runs one storm, judges it and prints its figures. Each worker
is a fork, so that a thousand of them cost little. It says what it is about to do, and what came of
it, with `write(2)`, 32 bytes a record, which a SIGKILL leaves standing: what was in flight then may
have happened or not, all else is certain.
"""

import collections
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import millstream

LEASE = 0.25
LEASE_NS = int(LEASE * 1e9)
KEYS = 16
WORKERS_MAX = 1 << 15
TOTALS = ("put", "done", "failed", "expired", "cancelled", "evicted", "redelivered", "corrupt",
          "refused", "oldest_age", "by_lane")  # fmt: skip
BLOCKS = 1024
RECORD = struct.Struct("<QQQQ")
HEAD = struct.Struct("<QQ")
PUTTING, PUT, TAKEN, ENDING, ENDED, CANCELLING, CANCELLED = range(1, 8)
ACK, NACK, RELEASE, EXTEND = range(1, 5)
OK, LOST = 1, 2


# --- workers --------------------------------------------------------------------------------------


class Account:
    """What one worker did."""

    def __init__(self, directory: Path, number: int) -> None:
        self.descriptor = os.open(directory / f"{number}.account", os.O_WRONLY | os.O_CREAT, 0o600)

    def say(self, *records: tuple[int, int, int, int, int]) -> None:
        """(operation, number of the message, time, two more) of each."""
        parts = [RECORD.pack(op << 56 | number, at, a, b) for op, number, at, a, b in records]
        os.write(self.descriptor, b"".join(parts))


def content(number: int, size: int, key: int) -> bytes:
    head = HEAD.pack(number, key << 32 | size)
    return (head * (size // 16 + 1))[: max(size, 16)]


def named(value: bytes) -> tuple[int, int]:
    """(number, key) of a message; it must be whole."""
    number, rest = HEAD.unpack_from(value)
    assert value == content(number, rest & 0xFFFFFFFF, rest >> 32), f"{number:x} is damaged"
    return number, rest >> 32


def produce(q, account, worker, dice, shared, ordered) -> None:
    number, key, put = worker << 32, 0, 0
    while not shared[0]:
        count = dice.choice((1, 1, 1, 1, 10, 100, 100))
        items = []
        for i in range(count):
            size = dice.choice((16, 16, 16, 16, 100, 300) if count > 1 else (16, 100, 5000, 12_000))
            if ordered:
                key = dice.randrange(KEYS)
            item = {"value": content(number + i, size, key), "key": b"%d" % key}
            if not ordered:
                item["priority"] = dice.randrange(4)
            if dice.random() < 0.02:
                item["delay"] = dice.random() * 0.05
            items.append(item)
        account.say((PUTTING, number, time.monotonic_ns(), count, 0))
        if count == 1:
            try:
                ids = [q.put(**items[0], timeout=0.02)]
            except millstream.QueueFull:
                ids = []
        else:
            ids = q.put_many([millstream.Put(**item) for item in items], timeout=0.02)
        account.say((PUT, number, time.monotonic_ns(), len(ids), 0))
        if ids and dice.random() < 0.02:
            chosen = dice.randrange(len(ids))
            account.say((CANCELLING, number + chosen, time.monotonic_ns(), 0, 0))
            done = q.cancel(ids[chosen])
            account.say((CANCELLED, number + chosen, time.monotonic_ns(), OK if done else LOST, 0))
        number += count
        put += len(ids)
        shared[worker] = put


def consume(q, account, worker, dice, shared, ordered) -> None:
    while not shared[0]:
        began = time.monotonic_ns()
        ms = q.get_many(dice.choice((1, 1, 10, 100, 100)), timeout=0.02)
        ended = time.monotonic_ns()
        taken = {named(m.value)[0]: m for m in ms}
        account.say(
            *((TAKEN, n, began, ended, named(m.value)[1] << 56 | m.id) for n, m in taken.items())
        )
        if dice.random() < 0.01:
            time.sleep(LEASE * dice.uniform(0.5, 1.5))  # some outlive their lease
        rest = []
        for number, m in taken.items():
            luck = dice.random()
            if luck < 0.01:
                finish(account, number, NACK, lambda m=m: m.nack(delay=dice.random() * 0.02))
            elif luck < 0.02:
                finish(account, number, RELEASE, m.release)
            elif luck < 0.03 and finish(account, number, EXTEND, m.extend):
                rest.append((number, m))
            elif luck < 0.05 or len(taken) == 1:
                finish(account, number, ACK, m.ack)
            elif luck >= 0.05:
                rest.append((number, m))
        now = time.monotonic_ns()
        account.say(*((ENDING, number, now, ACK, 0) for number, _ in rest))
        lost = set(map(id, q.ack_many([m for _, m in rest])))
        now = time.monotonic_ns()
        account.say(*((ENDED, n, now, ACK, LOST if id(m) in lost else OK) for n, m in rest))


def finish(account, number, kind, call) -> bool:
    account.say((ENDING, number, time.monotonic_ns(), kind, 0))
    try:
        call()
        result = OK
    except millstream.LeaseLost:
        result = LOST
    account.say((ENDED, number, time.monotonic_ns(), kind, result))
    return result == OK


# --- the storm ------------------------------------------------------------------------------------


class Storm:
    def __init__(self, directory: Path, options: dict) -> None:
        self.directory, self.options = directory, options
        self.path = directory / "store"
        self.accounts = directory / "accounts"
        self.accounts.mkdir()
        self.dice = random.Random(options["seed"])
        self.shared = memoryview(mmap.mmap(-1, 4 * WORKERS_MAX)).cast("I")
        self.running: dict[int, int] = {}  # worker by pid
        self.stopped: dict[int, float] = {}  # pid: when it goes on
        self.died: dict[int, int] = {}  # worker: when it was killed, at the earliest
        self.started = self.pauses = self.generations = 0
        self.queue = {
            "capacity": 20_000, "payload_bytes": BLOCKS * 4096, "lease": LEASE,
            "retry": millstream.RetryPolicy(max_attempts=62, backoff=0.001),
            "ordering": "key" if options["ordered"] else None,
        }  # fmt: skip

    def start(self) -> None:
        self.started += 1
        worker = self.started
        seed = f"{self.options['seed']} {worker}"
        # Some of each are always there.
        now = [number % 7 < 3 for number in self.running.values()]
        while (worker % 7 < 3) != (now.count(True) < 3):
            self.started += 1
            worker = self.started
        pid = os.fork()
        if pid:
            self.running[pid] = worker
            return
        try:
            with millstream.open(self.path, durability="process") as store:
                q = store.queue("q", **self.queue)
                account = Account(self.accounts, worker)
                work = produce if worker % 7 < 3 else consume
                work(q, account, worker, random.Random(seed), self.shared, self.options["ordered"])
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def kill(self, pids: list[int]) -> None:
        now = time.monotonic_ns()
        for pid in pids:
            self.died[self.running[pid]] = now
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            status = os.waitpid(pid, 0)[1]
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            del self.running[pid]
            self.stopped.pop(pid, None)

    def run(self) -> None:
        while len(self.died) < self.options["kills"] or self.put() < self.options["messages"]:
            while len(self.running) < 7:
                self.start()
            # The moment of the kill is what varies.
            time.sleep(self.dice.uniform(0.0, self.options["pace"]))  # real processes, real time
            now = time.monotonic()
            for pid in [pid for pid, until in self.stopped.items() if until <= now]:
                os.kill(pid, signal.SIGCONT)
                del self.stopped[pid]
            luck = self.dice.random()
            pid = self.dice.choice(list(self.running))
            if luck < 0.01:
                self.kill(list(self.running))
                self.generations += 1
            elif luck < 0.15 and pid not in self.stopped and len(self.stopped) < 2:
                os.kill(pid, signal.SIGSTOP)
                self.stopped[pid] = now + LEASE * self.dice.uniform(0.1, 3)
                self.pauses += 1
            elif luck < 0.9 and (len(self.died) < 1.2 * self.options["kills"]):
                self.kill([pid])
            gone, status = os.waitpid(-1, os.WNOHANG) if self.running else (0, 0)
            assert gone == 0, f"a worker ended by itself: {status}"
        for pid in self.stopped:
            os.kill(pid, signal.SIGCONT)
        self.shared[0] = 1
        for pid in list(self.running):
            _, status = os.waitpid(pid, 0)
            del self.running[pid]
            assert status == 0, f"a worker ended with {status}"

    def put(self) -> int:
        return sum(self.shared[1 : self.started + 1])

    # --- what is left -----------------------------------------------------------------------------

    def drain(self) -> list[tuple[int, int, int]]:
        """(number, key, id) of all that is left; then all room must be free again."""
        left = []
        with millstream.open(self.path, durability="process") as store:
            q = store.queue("q")
            while len(q) and (ms := q.get_many(1000, timeout=60)):  # a lost hint is found in 2 s
                left += [(*named(m.value), m.id) for m in ms]
                assert q.ack_many(ms) == []
            q._check()
            assert len(q.dead) == 0, q.dead.list(3)
            self.all_free(q)
            if not self.options["ordered"]:
                assert len(q.put_many([b"x"] * 20_010)) == 20_000
                while ms := q.get_many(1000, timeout=0):
                    q.ack_many(ms)
            assert len(q.put_many([b"x" * 16_000] * 300)) == BLOCKS // 4, "blocks are missing"
            q.purge()
            self.all_free(q)
        problems = millstream.inspect.verify(self.path).problems
        assert not problems, problems
        return left

    @staticmethod
    def all_free(q) -> None:
        counts = q._counts()
        for of_its_life in TOTALS:
            counts.pop(of_its_life)
        states = {state for state, count in counts.items() if count}
        assert states <= {"free", "spare"}, f"slots are missing: {counts}"


# --- the judge ------------------------------------------------------------------------------------


class Lease:
    __slots__ = ("acted", "began", "ended", "promised", "proved", "taken", "worker")

    def __init__(self, worker: int, began: int, taken: int) -> None:
        self.worker, self.began, self.taken = worker, began, taken
        self.promised = began + LEASE_NS
        self.acted = self.ended = self.proved = 0

    def until(self, died: int | None) -> int:
        """Until when nobody else can have had it."""
        promised = min(self.promised, self.ended or self.promised, died or self.promised)
        return max(promised, self.proved)


class Judge:
    """What the accounts say happened, and whether it may."""

    def __init__(self, storm: Storm) -> None:
        self.storm = storm
        self.tried: set[int] = set()
        self.put: set[int] = set()
        self.leases: dict[int, list[Lease]] = collections.defaultdict(list)
        self.places: dict[int, tuple[int, int]] = {}  # number: (key, id)
        self.done: dict[int, tuple[int, int]] = {}  # number: when it was finished, from and to
        self.maybe: dict[int, int] = {}  # number: when that began; its process died in it
        self.counts: collections.Counter[str] = collections.Counter()
        for path in storm.accounts.iterdir():
            self.read(int(path.stem), path.read_bytes())

    def finished(self, number: int, began: int, ended: int) -> None:
        assert number not in self.done, f"finished twice: {number:x}"
        self.done[number] = began, ended

    def read(self, worker: int, data: bytes) -> None:
        current: dict[int, Lease] = {}
        pending: dict[int, int] = {}
        for head, at, a, b in RECORD.iter_unpack(data[: len(data) // 32 * 32]):
            op, number = head >> 56, head & (1 << 56) - 1
            if op == PUTTING:
                self.tried.update(range(number, number + a))
            elif op == PUT:
                self.put.update(range(number, number + a))
            elif op == TAKEN:
                current[number] = Lease(worker, at, a)
                self.leases[number].append(current[number])
                self.places[number] = b >> 56, b & (1 << 56) - 1
            elif op == ENDING:
                lease = current[number]
                lease.acted = at
                if a != EXTEND:
                    lease.ended = at
                if a == ACK:
                    pending[number] = at
            elif op == ENDED:
                lease = current[number]
                self.counts[("", "ack", "nack", "release", "extend")[a]] += b == OK
                self.counts["lost lease"] += b == LOST
                began = pending.pop(number, 0)
                if b == OK:
                    lease.proved = lease.acted
                    if a == EXTEND:
                        lease.promised = lease.acted + LEASE_NS
                    if a == ACK:
                        self.finished(number, began, at)
            elif op == CANCELLING:
                pending[number] = at
            elif op == CANCELLED:
                began = pending.pop(number)
                if a == OK:
                    self.finished(number, began, at)
                    self.counts["cancel"] += 1
        self.maybe.update(pending)

    def judge(self, left: list[tuple[int, int, int]]) -> dict[str, int]:
        died = self.storm.died
        at_end = [number for number, _, _ in left]
        assert len(at_end) == len(set(at_end)), "a message was there twice at the end"
        assert set(self.leases) | set(at_end) <= self.tried, "a message that nobody put"
        again = [number for number in at_end if number in self.done]
        for number, leases in self.leases.items():
            if number in self.done:
                again += [number for one in leases if one.began > self.done[number][1]]
            leases.sort(key=lambda lease: lease.taken)
            for i, one in enumerate(leases):
                until = one.until(died.get(one.worker))
                for other in leases[i + 1 :]:
                    if other.taken >= until:
                        break
                    both = other.until(died.get(other.worker)) > other.taken
                    assert not both, f"two live leases of {number:x}"
                    assert other.began < one.taken, f"leased under a live lease: {number:x}"
        lost = self.put - self.done.keys() - self.maybe.keys() - set(at_end)
        assert not again, f"{len(again)} delivered again after they were finished"
        assert not lost, f"{len(lost)} lost, the first {sorted(lost)[:3]}"
        if self.storm.options["ordered"]:
            self.judge_order(left)
        return {
            "put": len(self.put), "leases": sum(map(len, self.leases.values())),
            "left": len(left), "lost": len(lost), "again": len(again), **self.counts,
        }  # fmt: skip

    def judge_order(self, left: list[tuple[int, int, int]]) -> None:
        """No message of a key was taken before the one put ahead of it was finished."""
        never = 1 << 63
        lines: dict[int, list[tuple[int, int, int]]] = collections.defaultdict(list)
        for number, leases in self.leases.items():
            key, place = self.places[number]
            finished = (
                self.done[number][0] if number in self.done else self.maybe.get(number, never)
            )
            lines[key].append((place, min(lease.taken for lease in leases), finished))
        last: dict[int, int] = {}
        for number, key, place in left:
            assert place > last.get(key, 0), f"out of order at the end: {number:x}"
            last[key] = place
            if number not in self.leases:
                lines[key].append((place, never, never))
        for line in lines.values():
            before = 0
            for place, taken, finished in sorted(line):
                assert taken >= before, f"message {place} was taken before one ahead of it was done"
                before = max(before, finished)


def main(directory: str, text: str) -> None:
    storm = Storm(Path(directory), json.loads(text))
    began = time.monotonic()
    with millstream.open(storm.path, durability="process") as store:
        store.queue("q", **storm.queue)
    try:
        storm.run()
    finally:
        for pid in storm.running:
            os.kill(pid, signal.SIGKILL)
    ended = time.monotonic()
    left = storm.drain()
    figures = Judge(storm).judge(left)
    figures |= {
        "kills": len(storm.died), "pauses": storm.pauses, "generations": storm.generations,
        "workers": storm.started, "seconds": round(ended - began, 1),
        "judged": round(time.monotonic() - ended, 1),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
