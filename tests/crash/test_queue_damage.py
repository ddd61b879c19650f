"""Files of a queue that are damaged, foreign or of another version: said clearly, nothing lost."""

import os
import random
import shutil
import struct

import crash_workers as workers
import pytest

import millstream
from millstream import CorruptBatch, NotFound, VersionMismatch, _native, inspect

EXTENT = 4096
SLOTS_AT = EXTENT + 8 * 1024
CONTENT_AT = SLOTS_AT + 96
VALUES = [b"needle" * 10, b"long" * 2000, b"fine"]


def make(path):
    with millstream.open(path, durability="process") as store:
        q = store.queue("q", capacity=100, dead_limit=4, payload_bytes=1 << 20)
        q.put_many(VALUES)
    return path / "queues" / "q"


def poke(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path, at, bit=0):
    data = path.read_bytes()
    poke(path, at, bytes([data[at] ^ 1 << bit]))


def reseal(path, size, at, data):
    """Change a header and give it the right checksum."""
    head = bytearray(path.read_bytes()[: size - 8])
    head[at : at + len(data)] = data
    poke(path, 0, head + struct.pack("<Q", _native.xxh3_64(bytes(head))))


def foreign(name):
    def replace(directory):
        other = make(directory.parent.parent.with_name("other"))
        shutil.copy(other / name, directory / name)

    return replace


REFUSED = {
    "slots, header": (lambda d: flip(d / "slots", 20), CorruptBatch, "slots"),
    "blocks, header": (lambda d: flip(d / "blocks", 20), CorruptBatch, "blocks"),
    "slots, version": (lambda d: reseal(d / "slots", 56, 8, b"\2"), VersionMismatch, "slots"),
    "blocks, version": (lambda d: reseal(d / "blocks", 48, 8, b"\2"), VersionMismatch, "blocks"),
    "slots, slot_bytes": (lambda d: reseal(d / "slots", 56, 12, b"\0\2"), CorruptBatch, "slots"),
    "slots, short": (lambda d: os.truncate(d / "slots", 5000), CorruptBatch, "slots"),
    "blocks, short": (lambda d: os.truncate(d / "blocks", 5000), CorruptBatch, "blocks"),
    "slots, empty": (lambda d: os.truncate(d / "slots", 0), CorruptBatch, "slots"),
    "slots, none": (lambda d: (d / "slots").unlink(), NotFound, "slots"),
    "blocks, none": (lambda d: (d / "blocks").unlink(), NotFound, "blocks"),
    "slots, of another store": (foreign("slots"), CorruptBatch, "slots"),
    "blocks, of another store": (foreign("blocks"), CorruptBatch, "blocks"),
    "slots, count": (lambda d: poke(d / "slots", 128, b"\xff" * 4), CorruptBatch, "slots"),
    "blocks, count": (lambda d: poke(d / "blocks", 128, b"\xff" * 4), CorruptBatch, "blocks"),
    "queue.json": (lambda d: flip(d / "queue.json", 40), CorruptBatch, "queue.json"),
    "queue.json, none": (lambda d: (d / "queue.json").unlink(), CorruptBatch, "queue.json"),
    "queue.json, empty": (lambda d: os.truncate(d / "queue.json", 0), CorruptBatch, "queue.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_damaged_file_is_refused_and_comes_back_whole(tmp_path, what):
    damage, error, name = REFUSED[what]
    directory = make(tmp_path / "store")
    kept = tmp_path / "kept"
    shutil.copytree(directory, kept)
    damage(directory)
    for _ in range(2):  # a refusal changes nothing; the rest of the store goes on
        with millstream.open(tmp_path / "store") as store:
            with pytest.raises(error, match=f"queues/q/{name}"):
                store.queue("q")
            store.queue("other").put(b"x")
            store.stream("s").append(b"x")
    report = inspect.verify(tmp_path / "store")
    assert any(name in str(problem) for problem in report.problems) or what == "blocks, none"
    assert report.problems
    shutil.rmtree(directory)
    shutil.copytree(kept, directory)
    with millstream.open(tmp_path / "store") as store:
        assert [m.value for m in store.queue("q").get_many(5, timeout=0)] == VALUES


def test_message_says_what_was_expected_and_found(tmp_path):
    directory = make(tmp_path / "store")
    foreign("slots")(directory)
    with millstream.open(tmp_path / "store") as store:
        with pytest.raises(CorruptBatch, match="expected .*, found ") as refused:
            store.queue("q")
        assert refused.value.expected[0] == store.session.id.hex() != refused.value.found[0]
        assert refused.value.path == str(directory / "slots")


@pytest.mark.parametrize("damage", ["short", "foreign", "garbage", "none", "version"])
def test_hints_are_made_anew_whatever_is_there(tmp_path, damage):
    hints = make(tmp_path / "store") / "hints"
    if damage == "short":
        os.truncate(hints, 100)
    elif damage == "foreign":
        foreign("hints")(hints.parent)
    elif damage == "garbage":
        hints.write_bytes(random.Random(1).randbytes(hints.stat().st_size))
    elif damage == "none":
        hints.unlink()
    else:
        poke(hints, 8, b"\2")
    with millstream.open(tmp_path / "store") as store:
        q = store.queue("q")
        assert [m.value for m in q.get_many(5, timeout=0)] == VALUES
        q._check()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 0.99])
@pytest.mark.parametrize("name", ["slots", "blocks", "dedup"])
def test_file_that_was_cut_is_repaired_and_what_is_left_is_delivered(tmp_path, name, share):
    path = tmp_path / "store"
    with millstream.open(path, durability="process") as store:
        q = store.queue("q", capacity=100, dead_limit=4, payload_bytes=1 << 20, dedup_window=60)
        q.put_many([millstream.Put(value, dedup_id=value[:8]) for value in VALUES])
    file = path / "queues" / "q" / name
    os.truncate(file, int(file.stat().st_size * share))
    assert any(name in str(problem) for problem in inspect.verify(path).problems)
    assert [action.kind for action in inspect.repair(path) if action.kind == "cannot"] == []
    assert inspect.verify(path).problems == []
    with millstream.open(path) as store:
        q = store.queue("q")
        values = [m.value for m in q.get_many(5, timeout=0)]
        assert set(values) <= set(VALUES)
        if name == "dedup" or share > 0.3:
            assert values == VALUES
        elif name == "blocks":
            assert len(values) + len(q.dead) == len(VALUES)
        q.put(VALUES[1])
        with q.get(timeout=0) as m:
            assert m.value == VALUES[1]
        q._check()


@pytest.mark.parametrize("put_at", [-(1 << 63), 1, (1 << 63) - 1])
def test_damaged_message_can_be_looked_at_whatever_its_times_are(tmp_path, put_at):
    directory = make(tmp_path / "store")
    for field in range(8, 40, 8):  # of the first slot: put_at, due and expires are among them
        poke(directory / "slots", SLOTS_AT + field, struct.pack("<q", put_at))
    with millstream.open(tmp_path / "store") as store:
        q = store.queue("q")
        values = [m.value for m in q.peek(10)] + [letter.value for letter in q.dead.list()]
        assert sorted(values, key=str) == sorted([None, *VALUES[1:]], key=str)
        assert [m.value for m in q.get_many(5, timeout=0)] == VALUES[1:]
        assert [letter.value for letter in q.dead.list()] == [None]


def test_hints_that_are_damaged_while_others_live_are_refused(tmp_path):
    path = tmp_path / "store"
    hints = make(path) / "hints"
    with millstream.open(path) as store:
        q = store.queue("q")
        poke(hints, 20, b"\xff")
        with millstream.open(path) as second, pytest.raises(CorruptBatch, match="queues/q/hints"):
            second.queue("q")
        assert q.get(timeout=0).value == VALUES[0]


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("part", ["content", "header", "block", "block word"])
def test_flipped_bit_of_a_message_makes_a_dead_letter_of_it(tmp_path, part, opened):
    """Of the other messages none is touched, and verify names the file."""
    path = tmp_path / "store"
    directory = make(path)
    name, at = {
        "content": ("slots", CONTENT_AT + 7),
        "header": ("slots", SLOTS_AT + 30),
        "block": ("blocks", EXTENT + 8 * 512 + 5000),
        "block word": ("blocks", EXTENT + 8),  # of the first: they are filled from the end
    }[part]
    if not opened:
        flip(directory / name, at, 3)
        assert inspect.verify(path).problems
    with millstream.open(path, durability="process") as store:
        q = store.queue("q")
        if opened:
            flip(directory / name, at, 3)
        for _ in range(2):
            for m in q.get_many(5, timeout=0):
                assert m.value in VALUES
                m.ack()
        assert len(q) == 0
        (letter,) = q.dead.list()
        assert (letter.value, letter.reason) == (None, "torn or corrupt")
        q._check()
        assert q.dead.purge() == 1


@pytest.mark.parametrize("opened", [True, False])
def test_flipped_bit_of_a_state_word_loses_no_message(tmp_path, opened):
    """A word that is none is kept for the next first opener, who finds the message whole."""
    path = tmp_path / "store"
    directory = make(path)
    word_at = EXTENT + 7
    if not opened:
        flip(directory / "slots", word_at, 3)
    with millstream.open(path, durability="process") as store:
        q = store.queue("q")
        if opened:
            flip(directory / "slots", word_at, 3)
            with pytest.raises(AssertionError, match="state that there is not"):
                q._check()
            assert inspect.verify(path).problems
        assert [m.value for m in q.get_many(5, timeout=0)] == VALUES[1:]
    with millstream.open(path) as store:
        q = store.queue("q")
        (letter,) = q.dead.list()
        assert letter.value == VALUES[0]
        assert q.dead.redrive() == 1
        q._check()


def poked(path, seed):
    """Work while random words of the hints change; every message is done in the end."""
    dice = random.Random(seed)
    with millstream.open(path, durability="process") as store:
        q = store.queue("q", capacity=500, priorities=3, lease=0.05, dead_limit=8,
                        retry=millstream.RetryPolicy(max_attempts=60))  # fmt: skip
        done, put = set(), set()
        hints = os.open(os.path.join(path, "queues/q/hints"), os.O_RDWR)
        size = os.fstat(hints).st_size
        for step in range(1500):
            at = dice.choice((dice.randrange(64, 4096 + 8192), dice.randrange(64, size - 8)))
            if not 52 <= at < 56:
                os.pwrite(hints, dice.randbytes(8) if step % 3 else bytes(8), at // 8 * 8)
            try:
                if q.put_many([millstream.Put(b"%d" % step, delay=0.001 * (step % 3))]):
                    put.add(b"%d" % step)
                for m in q.get_many(3, timeout=0):
                    if q.ack_many([m]) == []:
                        done.add(m.value)
            except millstream.LockTimeout:
                pass
        os.close(hints)
    with millstream.open(path) as store:
        q = store.queue("q")
        q._check()
        while ms := q.get_many(100, timeout=0.2):
            done.update(m.value for m in ms)
            q.ack_many(ms)
        assert done >= put, sorted(put - done)[:5]
        print(len(put), flush=True)


def test_hints_full_of_garbage_neither_crash_nor_lose(tmp_path):
    seed = workers.seed_of("poked_hints")
    ops = 0
    for run in range(4):
        ops += int(workers.run("test_queue_damage.poked", str(tmp_path / f"s{run}"), seed + run))
    workers.report(ops, 6000, seed)


def test_message_of_another_queue_is_refused_and_stays(tmp_path):
    with millstream.open(tmp_path / "a") as one, millstream.open(tmp_path / "b") as two:
        queues = one.queue("q"), one.queue("r"), two.queue("q")
        for q in queues:
            q.put(b"x")
        taken = [q.get(timeout=0) for q in queues]
        for q, m in zip(queues, taken[1:] + taken[:1], strict=True):
            with pytest.raises(millstream.InvalidArgument, match="another queue"):
                q.ack_many([m])
            with pytest.raises(millstream.InvalidType):
                q.ack_many([m.id])
        assert [len(q) for q in queues] == [1, 1, 1]
        assert [q.ack_many([m]) for q, m in zip(queues, taken, strict=True)] == [[], [], []]
