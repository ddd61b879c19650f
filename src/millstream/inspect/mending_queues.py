"""What repair does to the files of a queue: planned here, written by `mending`.

Rules: (1) a word that is no state is FREE afterwards, unless its slot holds a whole message: that
becomes a dead letter, since it may have been finished. (2) A damaged message becomes a dead letter
whose failure says so. (3) A put that never was is FREE. (4) A header page is made anew from
`queue.json` and what is left of it, if messages prove that the salt is right. (5) A file that is
too short gets zeros behind it: what is left stays, the messages that reached into the rest are
damaged.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from millstream.inspect import dedup
from millstream.inspect.catalog import StoreInfo
from millstream.inspect.layout import File, Invalid, Problem, hash64
from millstream.inspect.queue_layout import (
    BLOCK_COUNT_MAX,
    BLOCKS,
    DAMAGED,
    DEAD,
    EXTENT_BLOCKS,
    EXTENT_SLOTS,
    FAILURE,
    FAILURE_BYTES,
    FREE,
    PAGE,
    SLOT,
    SLOT_COUNT_MAX,
    SLOTS,
    SLOTS_LIVE,
    SPARE,
    STATES,
    TEXT_BYTES_MAX,
    WRITING,
    Word,
)
from millstream.inspect.queues import Damaged, NeverPut, Queue, open_queue

LIVE_AT, WALL_AT = 128, 144
WAS = "its state word was damaged; it may have been finished before"


@dataclass(slots=True)
class Plan:
    """What is to be done to one queue: patches by file, with what to say of each."""

    patches: dict[Path, list[tuple[int, bytes]]] = field(default_factory=dict)
    used: dict[Path, int] = field(default_factory=dict)  # bytes of a file that mean something
    least: dict[Path, int] = field(default_factory=dict)  # bytes that a file must have
    done: list[tuple[str, Path, int, str]] = field(default_factory=list)
    cannot: list[Problem] = field(default_factory=list)

    def add(self, kind: str, path: Path, position: int, raw: bytes, text: str = "") -> None:
        """Note a patch, and what it does where that is not said already."""
        self.patches.setdefault(path, []).append((position, raw))
        if text:
            self.done.append((kind, path, position, text))


def plan(store: StoreInfo, path: Path) -> Plan:
    """Return what repair does to a queue that nobody has open. Raises Invalid or StorageError."""
    made = Plan()
    with Queue(store, open_queue(path)) as queue:
        made.least[path / "slots"] = queue.info.slots_bytes
        made.least[path / "blocks"] = queue.info.blocks_bytes
        mend_headers(queue, made)
        if queue.usable:
            mend_words(queue, made)
            extents = -(-queue.info.slot_count // EXTENT_SLOTS)
            made.used[path / "slots"] = PAGE + extents * queue.info.extent_bytes
            extents = -(-queue.info.block_count // EXTENT_BLOCKS)
            made.used[path / "blocks"] = PAGE + extents * EXTENT_BLOCKS * (8 + PAGE)
    return made


# header pages


def mend_headers(queue: Queue, made: Plan) -> None:
    """Plan new header pages for those that are damaged; `queue` can be read with them then."""
    for finding in queue.findings:
        if not isinstance(finding, Problem):
            continue
        if finding.kind == "blocks":
            mend_blocks_header(queue, made)
        elif finding.kind == "dedup":
            with File(finding.path) as file:
                found = dedup.page(file, queue.store.store_id, queue.info.queue_id)
            text = f"header page made anew, for {found[0]} stripes"
            made.add("dedup", finding.path, 0, found[1], text)
            made.least[finding.path] = dedup.table_bytes(found[0])
        elif finding.kind != "slots":  # a newer version, or a file that is not there
            made.cannot.append(finding)
            queue.usable = False
            return
    for finding in queue.findings:
        if isinstance(finding, Problem) and finding.kind == "slots":
            mend_slots_header(queue, made, finding)


def mend_blocks_header(queue: Queue, made: Plan) -> None:
    """Plan the page of `blocks`."""
    assert queue.blocks is not None
    raw = queue.fresh(queue.blocks, 0, PAGE)
    size = max(queue.blocks.size, queue.info.blocks_bytes)
    room = (size - PAGE) // (EXTENT_BLOCKS * (8 + PAGE)) * EXTENT_BLOCKS
    room = max(0, min(room, BLOCK_COUNT_MAX))
    config = -(-queue.info.config["payload_bytes"] // PAGE)
    most = BLOCKS.read(raw)["block_max"]
    if not config <= most <= room:  # it may be more than the configuration asks for, by rounding
        most = min(config, room)
    count = struct.unpack_from("<I", raw, LIVE_AT)[0]
    count = count if count <= most else most
    head = struct.pack("<8sII16sQ", b"MSQBLCK1", 1, most, queue.store.store_id, queue.info.queue_id)
    page = (head + struct.pack("<Q", hash64(head))).ljust(LIVE_AT, b"\0") + struct.pack("<I", count)
    queue.info = replace(queue.info, block_count=count)
    text = f"header page made anew, for {count} blocks"
    made.add("blocks", queue.info.path / "blocks", 0, page.ljust(PAGE, b"\0"), text)


def mend_slots_header(queue: Queue, made: Plan, finding: Problem) -> None:
    """Plan the page of `slots`, where its salt can be proved; else say that it cannot be done."""
    file, info = queue.slots, queue.info
    assert file is not None
    raw = queue.fresh(file, 0, PAGE)
    live = SLOTS_LIVE.read(raw[LIVE_AT:])
    most = min(info.slot_max, SLOT_COUNT_MAX)
    count = live["slot_count"]
    if count > most or (count % EXTENT_SLOTS and count != most):
        count = most
    salt = SLOTS.read(raw)["salt"]
    queue.info = info = replace(info, salt=salt, slot_count=count)
    queue.usable = True
    found: Counter[bool] = Counter()
    newest = 0
    for slot, word in holding(queue):
        if word.state not in STATES:
            continue
        try:
            newest = max(newest, queue.message(slot, word).id)
            found[True] += 1
        except NeverPut:
            continue
        except Damaged:
            found[False] += 1
    if found[False] and not found[True]:
        queue.usable = False
        bad = Invalid("a salt that some message has", "been hashed with", f"{salt:016x}")
        advice = "restore it from a backup; without the salt nothing can be checked"
        made.cannot.append(bad.problem("slots", finding.path, 40, advice))
        return
    next_id = live["next_id"] if live["next_id"] >> 40 <= queue.store.generation + 1 else 0
    next_id = max(next_id, newest + 1, queue.store.generation << 40)
    head = struct.pack(
        "<8sII16sQQ", b"MSQSLOT1", 1, info.slot_bytes, queue.store.store_id, info.queue_id, salt
    )
    page = bytearray((head + struct.pack("<Q", hash64(head))).ljust(PAGE, b"\0"))
    poison = live["poison"] if live["poison"] <= 2 else 0
    SLOTS_LIVE.pack.pack_into(page, LIVE_AT, count, int(live["paused"] == 1), poison, next_id)
    page[WALL_AT : WALL_AT + 8] = raw[WALL_AT : WALL_AT + 8]
    text = f"header page made anew, for {count} slots; {found[True]} messages prove its salt"
    made.add("slots", finding.path, 0, bytes(page), text)


# words


def holding(queue: Queue) -> Iterator[tuple[int, Word]]:
    """Yield the slots whose word is neither FREE, WRITING nor SPARE."""
    for first, words in queue.words():
        for index, value in enumerate(words.tolist()):
            if value >> 59 not in (FREE, WRITING, SPARE):
                yield first + index, Word(value)


def mend_words(queue: Queue, made: Plan) -> None:
    """Plan new words where they are damaged, or speak of messages that are."""
    path, ids = queue.info.path / "slots", Counter[int]()
    for slot, word in holding(queue):
        known = word.state in STATES
        reuse = word.reuse if known else stored_reuse(queue, slot)
        try:
            message = queue.message(slot, readable(word, reuse))
            ids[message.id] += 1
            if not known:
                bury(queue, made, slot, word, reuse, WAS)
        except NeverPut:
            text = f"slot {slot} freed: its put never was"
            made.add("message", path, queue.info.word_at(slot), pack(reuse << 40), text)
        except Damaged as damaged:
            if not known:
                text = f"slot {slot} freed: its word was damaged, and it holds no whole message"
                made.add("message", path, queue.info.word_at(slot), pack(reuse << 40), text)
            elif word.state != DEAD or not queue.buried(slot, word.reuse):
                bury(queue, made, slot, word, reuse, str(damaged))
    for one, count in ids.items():
        if count > 1:
            bad = Invalid(f"id {one}", "once", f"{count} times")
            made.cannot.append(bad.problem("twice", path, None, "cancel all but one of them"))


def stored_reuse(queue: Queue, slot: int) -> int:
    """Return the reuse that a slot itself tells."""
    raw = queue.fresh(queue.slots, queue.info.slot_at(slot), SLOT.size)
    return int(SLOT.read(raw)["reuse"]) & 1023


def readable(word: Word, reuse: int) -> Word:
    """Return the word as it would be read: as it is, or made from the slot where it is no state."""
    if word.state in STATES:
        return word
    return Word(DEAD << 59 | reuse << 40 | word.value & (1 << 40) - 1)


def bury(queue: Queue, made: Plan, slot: int, word: Word, reuse: int, why: str) -> None:
    """Plan that a message becomes a dead letter: its failure record, then its word."""
    info, path = queue.info, queue.info.path / "slots"
    header = SLOT.read(queue.fresh(queue.slots, info.slot_at(slot), SLOT.size))
    lane = header["lane"] & 7 if word.state not in STATES else word.lane
    lane = min(lane, info.config["priorities"] - 1)
    grant = min(word.value >> 34 & 63, 62)
    value = DEAD << 59 | lane << 56 | word.attempts << 50 | reuse << 40 | grant << 34 | word.tick
    which, record = failure_record(queue, slot, reuse, header["id"], word.attempts, why)
    made.add("message", path, info.failure_at(slot, which), record)
    text = f"slot {slot} is a dead letter now: {why}"
    made.add("message", path, info.word_at(slot), pack(value), text)


def failure_record(
    queue: Queue, slot: int, reuse: int, message_id: int, attempts: int, why: str
) -> tuple[int, bytes]:
    """Return which of the two records to write over, and what with; the newest one is kept."""
    known = queue.failures_of(slot, reuse, message_id)
    now = int(time.time() * 1e6)
    last_at = max(known[0].last_at + 1, now) if known else now
    text = cut(why)
    first, first_at = (cut(known[0].first), known[0].first_at) if known else (text, now)
    raw = FAILURE.pack.pack(
        0, message_id, first_at, last_at, attempts, DAMAGED, len(first), len(text), first, text
    )
    raw = struct.pack("<Q", hash64(raw[8:], queue.info.seed(slot, reuse))) + raw[8:]
    at = queue.info.failure_at(slot, 0)
    zeroth = FAILURE.read(queue.fresh(queue.failures, at, FAILURE_BYTES))
    newest = (zeroth["last_at"], zeroth["attempts"])
    return int(bool(known) and newest == (known[0].last_at, known[0].attempts)), raw


def cut(text: str) -> bytes:
    """Return a text as a failure record has room for it."""
    return text.encode()[:TEXT_BYTES_MAX].decode(errors="ignore").encode()


def pack(word: int) -> bytes:
    """Return a state word as it lies in the file."""
    return struct.pack("<Q", word)
