"""The second reader against queues that a builder of its own made, whole and damaged."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from queue_builder import (
    ACKING,
    DEAD,
    DELAYED,
    FREE,
    HELD,
    LEASED,
    PAGE,
    PREPARED,
    READY,
    SPARE,
    WRITING,
    QueueBuilder,
    word,
)
from store_builder import StoreBuilder, flip, hash64, json_bytes, poke
from store_builder import put as put_file

from millstream import inspect
from millstream.errors import CorruptBatch, MillstreamError, NotFound


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def queue(store: StoreBuilder) -> QueueBuilder:
    return QueueBuilder(store)


def verify(queue: QueueBuilder) -> inspect.Report:
    return inspect.verify(queue.store.path)


def messages(queue: QueueBuilder) -> list[inspect.Message]:
    return list(inspect.messages(queue.store.path))


def kinds(report: inspect.Report) -> list[str]:
    return [problem.kind for problem in report.problems]


def notes(report: inspect.Report) -> list[str]:
    return [note.kind for note in report.notes]


def mended(queue: QueueBuilder) -> list[inspect.Action]:
    """Repair, and hold a dry run before to the same; then nothing may be wrong any more."""
    before = sorted(path.name for path in queue.path.iterdir())
    planned = inspect.repair(queue.store.path, dry_run=True)
    assert sorted(path.name for path in queue.path.iterdir()) == before
    done = inspect.repair(queue.store.path)
    assert [(a.kind, a.position) for a in planned] == [(a.kind, a.position) for a in done]
    assert inspect.verify(queue.store.path).ok
    assert inspect.repair(queue.store.path) == []
    return done


# Whole queues -------------------------------------------------------------------------------------


def test_messages_come_back_as_they_were_put(queue: QueueBuilder) -> None:
    headers = [("h", b"v"), ("é", b"")]
    queue.put(b"one", key=b"k", headers=headers, lane=2, due=5, expires=9, put_at=3)
    queue.put(b"", state=DELAYED, attempts=2)
    queue.put(b"x" * 20_000, key=b"big", state=LEASED, headers=headers, slot=999)
    queue.put(b"", key=b"", slot=1001)
    queue.write()
    first, second, third, fourth = messages(queue)
    assert (first.payload, first.key, first.headers) == (b"one", b"k", headers)
    assert (first.state, first.lane, first.put_at, first.due, first.expires) == (
        "ready",
        2,
        3,
        5,
        9,
    )
    assert (first.id, second.id) == (1 << 40 | 1, 1 << 40 | 2)
    assert (second.payload, second.state, second.attempts, second.tick) == (b"", "delayed", 2, 77)
    assert (second.key, fourth.key) == (None, b"")
    assert (third.payload, third.key, third.slot) == (b"x" * 20_000, b"big", 999)
    assert third.blocks == [0, 2, 4, 6, 8]
    assert (third.queue, third.headers, third.state) == ("q", headers, "leased")


def test_content_is_inline_up_to_the_slot_and_in_blocks_above(queue: QueueBuilder) -> None:
    for size in (0, 159, 160, 161, PAGE, PAGE + 1, 3 * PAGE):
        queue.put(os.urandom(size))
    queue.write()
    assert [len(one.blocks) for one in messages(queue)] == [0, 0, 0, 1, 1, 2, 3]
    assert verify(queue).ok


def test_states_that_hold_a_message(queue: QueueBuilder) -> None:
    for state in (READY, DELAYED, LEASED, DEAD, HELD, PREPARED, ACKING, FREE, WRITING, SPARE):
        queue.put(b"m", state=state)
    queue.write()
    found = [one.state for one in messages(queue)]
    assert found == ["ready", "delayed", "leased", "dead", "held", "prepared", "acking"]


def test_failures_of_a_message_newest_first(queue: QueueBuilder) -> None:
    slot = queue.put(b"m", state=DEAD, attempts=3)
    queue.fail(slot, 1, b"second", attempts=2, first=b"first", at=20)
    queue.fail(slot, 0, b"third", attempts=3, first=b"first", at=30, kind=4)
    other = queue.put(b"n")
    queue.fail(other, 0, b"of an earlier message", message_id=5)
    queue.fail(other, 1, b"of an earlier reuse", reuse=9)
    queue.write()
    one, two = messages(queue)
    assert [(f.kind, f.attempts, f.first, f.last) for f in one.failures] == [
        ("rejected", 3, "first", "third"),
        ("failed", 2, "first", "second"),
    ]
    assert (one.failures[0].first_at, one.failures[0].last_at) == (27, 30)
    assert two.failures == []


def test_verify_of_a_whole_queue_finds_nothing(queue: QueueBuilder) -> None:
    queue.put(b"m", key=b"key")
    queue.put(b"b" * 5000)
    queue.write()
    report = verify(queue)
    assert (report.problems, report.notes) == ([], [])
    assert (report.queues, report.messages, report.bytes) == (1, 2, 5004)


def test_a_queue_without_blocks_and_hints_can_be_read(queue: QueueBuilder) -> None:
    queue.put(b"m")
    queue.write()
    (queue.path / "blocks").unlink()
    (queue.path / "hints").unlink()
    assert [one.payload for one in messages(queue)] == [b"m"]
    report = verify(queue)
    assert (report.problems, report.notes) == ([], [])
    put_file(queue.path / "hints", b"?")
    assert notes(verify(queue)) == ["hints"]


def test_several_extents_and_queues(store: StoreBuilder) -> None:
    a = QueueBuilder(store, "a", extents=3, capacity=3000, dead_limit=72, slot_bytes=128)
    b = QueueBuilder(store, "b", slot_bytes=512)
    for slot in (0, 1023, 1024, 2999):
        a.put(b"%d" % slot, slot=slot)
    b.put(b"b" * 400)
    a.write()
    b.write()
    assert [one.payload for one in inspect.messages(store.path, "a")] == [
        b"0", b"1023", b"1024", b"2999",
    ]  # fmt: skip
    assert inspect.verify(store.path).messages == 5
    assert inspect.verify(store.path, queue="b").messages == 1
    store.stream("s").log(0).append([b"x"])
    store.write()
    assert inspect.verify(store.path, "s").queues == 0
    assert inspect.verify(store.path, queue="a").streams == 0


def test_unknown_queues_are_refused(queue: QueueBuilder) -> None:
    queue.write()
    for name in ("r", "../q", "", ".", "a/b"):
        with pytest.raises(NotFound):
            list(inspect.messages(queue.store.path, name))
        with pytest.raises(NotFound):
            inspect.verify(queue.store.path, queue=name)
        with pytest.raises(NotFound):
            inspect.repair(queue.store.path, queue=name)


def test_dump_says_every_queue_and_message(queue: QueueBuilder) -> None:
    slot = queue.put(b"m", state=DEAD)
    queue.fail(slot, 0, b"bad address")
    queue.set_word(1000, word(FREE))
    queue.put(b"n")
    queue.write()
    flip(queue.path / "slots", queue.slot_at(1) + 96)
    lines = [str(line) for line in inspect.dump(queue.store.path)]
    assert [line.split()[0] for line in lines] == ["queue", "message", "problem"]
    items = [json.loads(json.dumps(item)) for item in inspect.dump(queue.store.path, json=True)]
    assert items[0]["slot_count"] == 1024
    assert (items[1]["state"], items[1]["last"]) == ("dead", "bad address")
    assert items[2]["kind"] == "message"
    assert len(list(inspect.dump(queue.store.path, queue="q"))) == 3


# Damage -------------------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_state_is_no_state(queue: QueueBuilder) -> None:
    for state in (FREE, WRITING, READY, DELAYED, LEASED, DEAD, SPARE, HELD, PREPARED, ACKING):
        for bit in range(5):
            queue.set_word(0, word(state ^ 1 << bit))
            queue.write()
            assert kinds(verify(queue)) == ["message"], (state, bit)


def test_every_bit_of_slot_and_content_is_covered(queue: QueueBuilder) -> None:
    queue.put(b"payload", key=b"key", headers=[("h", b"v")])
    queue.write()
    end = 96 + 7 + 3 + 7
    for at in range(end):
        flip(queue.path / "slots", queue.slot_at(0) + at, at % 8)
        report = verify(queue)
        assert kinds(report) == ["message"], at
        with pytest.raises(CorruptBatch):
            messages(queue)
        flip(queue.path / "slots", queue.slot_at(0) + at, at % 8)
    flip(queue.path / "slots", queue.slot_at(0) + end)
    assert verify(queue).ok


def test_a_message_of_another_slot_is_not_taken_for_this_one(queue: QueueBuilder) -> None:
    queue.put(b"m")
    queue.put(b"n")
    raw = queue.slots[queue.slot_at(0) : queue.slot_at(1)]
    queue.slots[queue.slot_at(1) : queue.slot_at(2)] = raw
    queue.write()
    assert kinds(verify(queue)) == ["message"]


def test_chains_of_blocks_are_checked(queue: QueueBuilder) -> None:
    queue.put(b"a" * 9000)  # blocks 0, 2, 4
    queue.put(b"b" * 9000)  # 5, 7, 9
    queue.write()
    at = queue.block_word_at(2)
    right = struct.unpack_from("<Q", queue.blocks, at)[0]
    wrong = {
        "another slot": right + (1 << 24),
        "another reuse": right ^ 1 << 50,
        "no such block": right | (1 << 24) - 1,
        "a circle": right & ~((1 << 24) - 1) | 1,
        "too short": right & ~((1 << 24) - 1),
        "of another message": right & ~((1 << 24) - 1) | 6,
    }
    for what, value in wrong.items():
        poke(queue.path / "blocks", at, struct.pack("<Q", value))
        report = verify(queue)
        assert kinds(report) == ["message"], what
        assert report.messages == 1
        assert report.problems[0].path.name == "blocks"
    poke(queue.path / "blocks", at, struct.pack("<Q", right ^ 1 << 63))  # only the tag
    assert verify(queue).ok
    flip(queue.path / "blocks", queue.block_at(4) + 9)
    assert kinds(verify(queue)) == ["message"]


def test_a_longer_chain_than_the_content_is_a_problem(queue: QueueBuilder) -> None:
    queue.put(b"a" * 5000)
    queue.write()
    at = queue.block_word_at(2)
    value = struct.unpack_from("<Q", queue.blocks, at)[0]
    poke(queue.path / "blocks", at, struct.pack("<Q", value | 9))
    assert kinds(verify(queue)) == ["message"]


def test_lengths_beyond_everything_are_refused(queue: QueueBuilder) -> None:
    queue.put(b"m", lengths=(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF))
    queue.put(b"m" * 5000, lengths=(0xFFFFFFFF, 0, 0))
    queue.put(b"m" * 5000, lengths=(4000, 1 << 17, 0))
    queue.write()
    assert kinds(verify(queue)) == ["message"] * 3


@pytest.mark.parametrize(
    "raw", [b"\x05ab", b"\x01a\xff\xff\xff\xff", b"\x00\x01\x00\x00\x00", b"\xff" * 9, b"\x00" * 7]
)
def test_headers_that_do_not_fill_their_length(queue: QueueBuilder, raw: bytes) -> None:
    queue.put(b"", raw_headers=raw)
    queue.write()
    assert kinds(verify(queue)) == ["message"]


def test_a_put_that_never_was(queue: QueueBuilder) -> None:
    queue.put(b"m", reuse=2, stored_reuse=1)
    queue.put(b"n")
    queue.write()
    assert kinds(verify(queue)) == ["message"]  # a clean store lost it some other way
    queue.store.clean = False
    queue.write()
    report = verify(queue)
    assert report.ok
    assert notes(report) == ["unclean", "unput"]
    assert [one.payload for one in messages(queue)] == [b"n"]


def test_two_messages_of_one_id(queue: QueueBuilder) -> None:
    queue.put(b"m", message_id=7)
    queue.put(b"n", message_id=7)
    queue.write()
    assert kinds(verify(queue)) == ["twice"]
    assert [action.kind for action in inspect.repair(queue.store.path)] == ["cannot"]


def test_spare_and_dead_must_add_up(queue: QueueBuilder) -> None:
    queue.put(b"m", state=DEAD)  # one spare slot should be free for it
    queue.write()
    assert notes(verify(queue)) == ["spare"]
    queue.set_word(1000, word(FREE))
    queue.write()
    assert notes(verify(queue)) == []
    queue.set_word(1001, word(FREE))
    queue.write()
    assert notes(verify(queue)) == ["spare"]


def test_more_dead_letters_than_allowed_is_a_note(store: StoreBuilder) -> None:
    queue = QueueBuilder(store, capacity=1022, dead_limit=2)
    for _ in range(3):
        queue.put(b"m", state=DEAD)
    queue.set_word(1022, word(FREE))
    queue.set_word(1023, word(FREE))
    queue.write()
    assert notes(verify(queue)) == ["dead"]


def test_blocks_that_belong_to_nothing_are_a_note(queue: QueueBuilder) -> None:
    slot = queue.put(b"m")
    queue.put_blocks(b"x", slot, 1)
    queue.put_blocks(b"x", slot, 2)  # another reuse: free
    queue.put_blocks(b"x", 500, 0)  # of a free slot: free
    queue.write()
    report = verify(queue)
    assert notes(report) == ["leaked"]
    assert report.notes[0].text.startswith("1 block")


def test_a_sound_word_with_an_unknown_lane_is_a_problem(queue: QueueBuilder) -> None:
    queue.put(b"m", lane=5)
    queue.write()
    assert kinds(verify(queue)) == ["message"]


def test_damage_of_headers_and_json(queue: QueueBuilder) -> None:
    queue.put(b"m" * 5000)
    queue.write()
    for file, at in (("slots", 3), ("slots", 45), ("slots", 50), ("blocks", 20), ("blocks", 41)):
        flip(queue.path / file, at)
        assert file in kinds(verify(queue)), (file, at)
        flip(queue.path / file, at)
    assert verify(queue).ok
    poke(queue.path / "slots", 128, struct.pack("<I", 2048))
    assert kinds(verify(queue)) == ["slots"]
    poke(queue.path / "slots", 128, struct.pack("<I", 1024))
    put_file(queue.path / "queue.json", json_bytes({**queue.body, "slot_bytes": 1 << 40}))
    assert kinds(verify(queue)) == ["queue"]
    put_file(queue.path / "queue.json", json_bytes({**queue.body, "format": 2}))
    assert kinds(verify(queue)) == ["version"]
    (queue.path / "queue.json").unlink()
    assert kinds(verify(queue)) == ["unreadable"]


def test_a_short_file_is_a_finding_not_a_crash(queue: QueueBuilder) -> None:
    queue.put(b"m" * 5000)
    queue.write()
    for size in (0, 1, 4095, 4096, 10_000):
        for name in ("slots", "blocks"):
            queue.write()
            os.truncate(queue.path / name, size)
            assert not verify(queue).ok, (name, size)


@pytest.mark.parametrize("name", ["blocks", "dedup"])
def test_a_file_that_is_none_is_named_and_the_rest_is_read(queue: QueueBuilder, name: str) -> None:
    queue.put(b"m")
    queue.write()
    (queue.path / name).unlink(missing_ok=True)
    os.mkfifo(queue.path / name)
    report = verify(queue)
    assert [(one.kind, one.path.name) for one in report.problems] == [("unreadable", name)]
    assert report.messages == 1


@pytest.mark.parametrize("priorities", [0, 9])
def test_priorities_beyond_what_a_word_has_are_refused(
    queue: QueueBuilder, priorities: int
) -> None:
    queue.write()
    put_file(queue.path / "queue.json", json_bytes({**queue.body, "priorities": priorities}))
    assert kinds(verify(queue)) == ["queue"]


@pytest.mark.parametrize("name", ["queue.json", "slots"])
def test_a_file_that_cannot_be_read_is_named_and_not_mended(
    queue: QueueBuilder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put(b"m")
    queue.write()
    flip(queue.path / "slots", queue.slot_at(0) + 96)  # or there would be nothing to mend
    before = (queue.path / "slots").read_bytes()
    real = os.pread

    def pread(fd: int, size: int, at: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(queue.path / name) and at < 1 << 40:
            raise OSError(5, "Input/output error")
        return real(fd, size, at)

    monkeypatch.setattr(os, "pread", pread)
    assert kinds(verify(queue)) == ["unreadable"]
    assert [action.kind for action in inspect.repair(queue.store.path)] == ["cannot"]
    monkeypatch.undo()
    assert (queue.path / "slots").read_bytes() == before
    assert [action.kind for action in mended(queue)] == ["message", "unclean"]


def test_files_set_aside_are_notes(queue: QueueBuilder) -> None:
    queue.write()
    for name in ("slots.corrupt", "hints.tmp", "stray"):
        put_file(queue.path / name, b"?")
    assert sorted(notes(verify(queue))) == ["corrupt", "foreign", "tmp"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 1 << 30))
def test_any_damage_ends_in_findings(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    queue = QueueBuilder(StoreBuilder(tmp_path / f"{seed}"), slot_bytes=128)
    for _ in range(6):
        queue.put(rng.randbytes(rng.choice((0, 20, 5000))), state=rng.choice((READY, DEAD, LEASED)))
    queue.write()
    for _ in range(rng.randrange(1, 12)):
        name = rng.choice(("slots", "blocks", "queue.json", "hints"))
        size = (queue.path / name).stat().st_size
        at = rng.choice((rng.randrange(size), rng.randrange(min(size, 20_000))))
        poke(queue.path / name, at, rng.randbytes(rng.choice((1, 8, 64))))
    verify(queue)
    list(inspect.dump(queue.store.path, json=True)) if verify(queue).ok else None
    try:
        inspect.repair(queue.store.path)
    except MillstreamError:
        return
    for entry in queue.path.iterdir():
        entry.unlink()


# Repair -------------------------------------------------------------------------------------------


def test_nothing_to_repair(queue: QueueBuilder) -> None:
    queue.put(b"m")
    queue.write()
    assert inspect.repair(queue.store.path) == []


def test_a_damaged_message_becomes_a_dead_letter_and_is_kept(queue: QueueBuilder) -> None:
    slot = queue.put(b"m", attempts=2, lane=1, grant=5)
    queue.fail(slot, 0, b"boom", attempts=1)
    queue.put(b"n")
    queue.set_word(1000, word(FREE))
    queue.write()
    flip(queue.path / "slots", queue.slot_at(0) + 96)
    actions = mended(queue)
    assert [action.kind for action in actions] == ["message", "unclean"]
    assert [one.payload for one in messages(queue)] == [b"n"]
    assert notes(verify(queue)) == ["unclean", "corrupt", "buried"]
    raw = (queue.path / "slots").read_bytes()
    found = struct.unpack_from("<Q", raw, queue.word_at(0))[0]
    assert found == word(DEAD, lane=1, attempts=2, grant=5)
    record = raw[queue.failure_at(0, 1) : queue.failure_at(0, 1) + 256]
    assert record[34] == 6
    assert record[40:44] == b"boom"
    assert raw[queue.slot_at(0) + 96] == ord("m") ^ 1
    kept = (queue.path / "slots.corrupt").read_bytes()
    assert struct.unpack_from("<Q", kept, queue.word_at(0))[0] >> 59 == READY


def test_a_damaged_word_with_a_whole_message_becomes_a_dead_letter(queue: QueueBuilder) -> None:
    queue.put(b"m", reuse=3)
    queue.set_word(0, word(READY ^ 1, reuse=3))
    queue.set_word(1000, word(FREE))
    queue.write()
    assert [action.kind for action in mended(queue)] == ["message", "unclean"]
    (one,) = messages(queue)
    assert (one.state, one.payload, one.reuse) == ("dead", b"m", 3)
    assert one.failures[0].kind == "damaged"
    assert "may have been finished" in one.failures[0].last


def test_a_damaged_word_without_a_message_is_free(queue: QueueBuilder) -> None:
    queue.set_word(0, word(READY ^ 1))
    queue.put(b"m", slot=1, stored_reuse=9, reuse=9)
    flip_at = queue.slot_at(1) + 96
    queue.set_word(1, word(1, reuse=4))
    queue.slots[flip_at] ^= 1
    queue.write()
    mended(queue)
    raw = (queue.path / "slots").read_bytes()
    assert struct.unpack_from("<Q", raw, queue.word_at(0))[0] == 0
    assert struct.unpack_from("<Q", raw, queue.word_at(1))[0] == 9 << 40


def test_a_put_that_never_was_is_freed(queue: QueueBuilder) -> None:
    queue.put(b"m", reuse=2, stored_reuse=1)
    queue.write()
    mended(queue)
    raw = (queue.path / "slots").read_bytes()
    assert struct.unpack_from("<Q", raw, queue.word_at(0))[0] == 2 << 40


def test_damaged_blocks_bury_their_message(queue: QueueBuilder) -> None:
    queue.put(b"m" * 9000)
    queue.put(b"n" * 9000)
    queue.set_word(1000, word(FREE))
    queue.write()
    flip(queue.path / "blocks", queue.block_at(2) + 1)
    assert [action.kind for action in mended(queue)] == ["message", "unclean"]
    assert [one.payload[:1] for one in messages(queue)] == [b"n"]


@pytest.mark.parametrize("at", [0, 9, 13, 20, 33, 49, 129])
def test_a_damaged_page_of_slots_is_made_anew(queue: QueueBuilder, at: int) -> None:
    queue.put(b"m")
    queue.put(b"n" * 5000)
    queue.write()
    flip(queue.path / "slots", at, 7)
    before = (queue.path / "slots").read_bytes()
    assert [action.kind for action in mended(queue)] == ["slots", "unclean"]
    assert [one.payload[:1] for one in messages(queue)] == [b"m", b"n"]
    assert (queue.path / "slots.corrupt").read_bytes() == before
    after = (queue.path / "slots").read_bytes()
    assert len(after) == len(before)
    assert after[:PAGE] == bytes(queue.slots[:PAGE])


def test_page_words_and_messages_are_mended_together(queue: QueueBuilder) -> None:
    for value in (b"a", b"b", b"c"):
        queue.put(value)
    queue.set_word(0, word(READY ^ 2))
    for slot in (1000, 1001):
        queue.set_word(slot, word(FREE))
    queue.write()
    flip(queue.path / "slots", 3)
    flip(queue.path / "slots", queue.slot_at(1) + 96)
    kinds = [action.kind for action in mended(queue)]
    assert kinds == ["slots", "message", "message", "unclean"]
    assert [(one.payload, one.state) for one in messages(queue)] == [
        (b"a", "dead"),
        (b"c", "ready"),
    ]


def test_a_page_whose_salt_is_gone_cannot_be_made_anew(queue: QueueBuilder) -> None:
    queue.put(b"m")
    queue.write()
    flip(queue.path / "slots", 41)
    assert [action.kind for action in inspect.repair(queue.store.path)] == ["cannot"]
    assert not verify(queue).ok


@pytest.mark.parametrize("what", ["gone", "newer"])
def test_slots_that_are_gone_or_newer_cannot_be_mended(queue: QueueBuilder, what: str) -> None:
    queue.put(b"m")
    queue.write()
    path = queue.path / "slots"
    if what == "gone":
        path.unlink()
    else:
        raw = bytearray(path.read_bytes())
        struct.pack_into("<I", raw, 8, 2)
        struct.pack_into("<Q", raw, 48, hash64(bytes(raw[:48])))
        put_file(path, bytes(raw))
    flip(queue.path / "blocks", 3)
    before = sorted((one.name, one.read_bytes()) for one in queue.path.iterdir())
    done = inspect.repair(queue.store.path)
    assert "cannot" in [action.kind for action in done]
    assert dict(before).get("slots") == (path.read_bytes() if path.exists() else None)
    assert not verify(queue).ok


def test_a_put_that_never_was_does_not_speak_against_a_salt(queue: QueueBuilder) -> None:
    queue.put(b"m", reuse=2, stored_reuse=1)
    queue.put(b"n")
    queue.write()
    flip(queue.path / "slots", 3)
    assert [action.kind for action in mended(queue)] == ["slots", "message", "unclean"]
    assert [one.payload for one in messages(queue)] == [b"n"]


def test_an_empty_queue_gets_any_page(queue: QueueBuilder) -> None:
    queue.write()
    poke(queue.path / "slots", 0, os.urandom(128))
    assert [action.kind for action in mended(queue)] == ["slots", "unclean"]


@pytest.mark.parametrize("at", [0, 14, 21, 41, 131])
def test_a_damaged_page_of_blocks_is_made_anew(queue: QueueBuilder, at: int) -> None:
    queue.put(b"n" * 5000)
    queue.write()
    flip(queue.path / "blocks", at, 7)
    assert [action.kind for action in mended(queue)] == ["blocks", "unclean"]
    assert [len(one.payload) for one in messages(queue)] == [5000]
    assert (queue.path / "blocks").read_bytes()[:PAGE] == bytes(queue.blocks[:PAGE])


def test_a_newer_queue_is_left_alone(queue: QueueBuilder) -> None:
    queue.config = {"format": 2}
    queue.write()
    before = (queue.path / "slots").read_bytes()
    assert [action.kind for action in inspect.repair(queue.store.path)] == ["cannot"]
    assert (queue.path / "slots").read_bytes() == before


def dedup_table(queue: QueueBuilder, stripes: int = 4) -> bytearray:
    ids = queue.store.store_id, queue.queue_id
    head = struct.pack("<8sII16sQ", b"MSQDEDU1", 1, stripes, *ids)
    head += struct.pack("<QI", hash64(head), 1)
    table = bytearray(head.ljust(2 * PAGE, b"\0") + bytes(stripes * 64 * 40))
    entry = struct.pack("<16sQq", b"k" * 16, 7, 1 << 60)
    table[2 * PAGE + 80 : 2 * PAGE + 120] = entry + struct.pack(
        "<II", hash64(entry, 9) & 0xFFFFFFFF, 9 << 2 | 2
    )
    return table


def test_a_table_of_deduplication_keys_is_checked_and_mended(queue: QueueBuilder) -> None:
    queue.write()
    path = queue.path / "dedup"
    table = dedup_table(queue)
    put_file(path, bytes(table))
    assert notes(verify(queue)) == []
    flip(path, 2 * PAGE + 81)
    report = verify(queue)
    assert report.ok
    assert report.notes[0].text.startswith("1 entries are torn")
    flip(path, 2 * PAGE + 81)
    for at in (0, 13, 20, 33, 41):
        flip(path, at, 3)
        assert kinds(verify(queue)) == ["dedup"], at
        flip(path, at, 3)
    put_file(path, bytes(dedup_table(queue, stripes=3)))  # with a right checksum
    assert kinds(verify(queue)) == ["dedup"]
    put_file(path, bytes(table))
    flip(path, 12, 5)
    assert [action.kind for action in mended(queue)] == ["dedup", "unclean"]
    assert path.read_bytes() == bytes(table)
