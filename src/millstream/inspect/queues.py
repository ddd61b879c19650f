"""The files of queues: state words, slots and blocks, read without the core. Hints are not needed.

A slot is read after its word; where it does not fit, both are read again, since a living process
may have moved on between the two. No length is used before it was compared with what its file can
hold, and at most one message is in memory.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from millstream.errors import NotFound, StorageError
from millstream.inspect import dedup
from millstream.inspect.catalog import StoreInfo, listing, read_json, unreadable
from millstream.inspect.layout import (
    KEY_BYTES_MAX,
    LEFT,
    NAME,
    Array,
    File,
    Finding,
    Invalid,
    Note,
    hash64,
)
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
    HINTS,
    HOLDING,
    KINDS,
    PAGE,
    QUEUE_JSON,
    SLOT,
    SLOT_BYTES_MAX,
    SLOT_COUNT_MAX,
    SLOTS,
    SLOTS_LIVE,
    SPARE,
    STATES,
    TEXT_BYTES_MAX,
    WRITING,
    Failure,
    Message,
    QueueInfo,
    Word,
    block_at,
    block_word_at,
    check,
    content_hash,
    headers_of,
)

TRIES = 4  # how often a slot that a living process may be changing is read


class NeverPut(Exception):
    """The word speaks of a message that is not in its slot: a power cut took the put."""


class Damaged(Exception):
    """A message that is not as it was put; carries what is wrong and where."""

    def __init__(self, bad: Invalid, path: Path, position: int) -> None:
        super().__init__(str(bad))
        self.bad, self.path, self.position = bad, path, position


def queue_paths(path: Path, only: str | None = None) -> list[Path]:
    """Return the directories of the queues, sorted by name; NotFound if `only` is not one."""
    top = path / "queues"
    if only is not None:
        if not NAME.fullmatch(only) or not (top / only).is_dir():
            raise NotFound(f"no queue {only!r} in {path}")
        return [top / only]
    found = [entry for entry in listing(top) if entry.is_dir() and NAME.fullmatch(entry.name)]
    return [
        entry for entry in found if not entry.name.endswith(".tmp") and not (entry / LEFT).exists()
    ]


def open_queue(path: Path) -> QueueInfo:
    """Read `queue.json` alone. Raises Invalid or StorageError."""
    body = read_json(path / "queue.json", QUEUE_JSON)
    if not 128 <= body["slot_bytes"] <= SLOT_BYTES_MAX or body["slot_bytes"] % 64:
        raise Invalid("slot_bytes", f"a multiple of 64 to {SLOT_BYTES_MAX}", body["slot_bytes"])
    if not 1 <= body["priorities"] <= 8:
        raise Invalid("priorities", "1 to 8", body["priorities"])
    return QueueInfo(path.name, path, int(body["queue_id"], 16), body, body["slot_bytes"])


class Queue:
    """One queue with its files open. `with` it; `problem` of the constructor goes to `findings`.

    `usable`: the header of `slots` is sound, so that messages can be read. `trusted`: what a word
    says is whole (the store is clean or alive); else a power cut may have taken parts.
    """

    def __init__(self, store: StoreInfo, info: QueueInfo) -> None:
        self.store, self.info = store, info
        self.trusted = store.clean or store.alive
        self.findings: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self.usable = False
        self._stack = ExitStack()
        self.slots: File | None = None
        self.failures: File | None = None
        self.blocks: File | None = None
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # headers

    def _open(self) -> None:
        path = self.info.path
        try:
            self.slots = self._stack.enter_context(File(path / "slots"))
            self.failures = self._stack.enter_context(File(path / "slots"))
            self.info = self._read_slots_header(self.slots)
            self.usable = True
        except Invalid as bad:
            advice = "millstream repair rebuilds the page from queue.json"
            self.findings.append(bad.problem("slots", path / "slots", 0, advice))
        except StorageError as error:
            self.findings.append(unreadable(path / "slots", error))
        if (path / "blocks").exists():
            try:
                self.blocks = self._stack.enter_context(File(path / "blocks"))
                count = self._read_blocks_header(self.blocks)
                self.info = replace(self.info, block_count=count)
            except Invalid as bad:
                advice = "millstream repair rebuilds the page from queue.json"
                self.findings.append(bad.problem("blocks", path / "blocks", 0, advice))
            except StorageError as error:
                self.findings.append(unreadable(path / "blocks", error))
        self._check_the_rest(path)

    def _identity(self, magic: bytes) -> dict[str, object]:
        ids = {"store_id": self.store.store_id, "queue_id": self.info.queue_id}
        return {"magic": magic, "version": 1, **ids}

    def _read_slots_header(self, file: File) -> QueueInfo:
        raw = file.read(0, PAGE).tobytes()
        if len(raw) < PAGE:
            raise Invalid("size of at least", PAGE, file.size)
        fields = SLOTS.read(raw)
        expected = {"checksum": hash64(raw[:48]), **self._identity(b"MSQSLOT1")}
        check(fields, {**expected, "slot_bytes": self.info.config["slot_bytes"]})
        live = SLOTS_LIVE.read(raw[128:])
        if file.size < self.info.slots_bytes:
            raise Invalid("size of at least", self.info.slots_bytes, file.size)
        most = min((file.size - PAGE) // self.info.extent_bytes * EXTENT_SLOTS, SLOT_COUNT_MAX)
        if live["slot_count"] > most:
            raise Invalid("slot_count of at most", most, live["slot_count"])
        info = replace(self.info, salt=fields["salt"], paused=bool(live["paused"]))
        names = ("slot_count", "poison", "next_id")
        return replace(info, **{name: live[name] for name in names})

    def _read_blocks_header(self, file: File) -> int:
        raw = file.read(0, PAGE).tobytes()
        if len(raw) < PAGE:
            raise Invalid("size of at least", PAGE, file.size)
        fields = BLOCKS.read(raw)
        check(fields, {"checksum": hash64(raw[:40]), **self._identity(b"MSQBLCK1")})
        if file.size < self.info.blocks_bytes:
            raise Invalid("size of at least", self.info.blocks_bytes, file.size)
        count: int = struct.unpack_from("<I", raw, 128)[0]
        room = (file.size - PAGE) // (EXTENT_BLOCKS * (8 + PAGE)) * EXTENT_BLOCKS
        most = min(room, fields["block_max"], BLOCK_COUNT_MAX)
        if count > most:
            raise Invalid("block_count of at most", most, count)
        return count

    def _check_the_rest(self, path: Path) -> None:
        known = {"queue.json", "slots", "blocks", "hints", "dedup"}
        for entry in listing(path):
            if entry.suffix in (".tmp", ".lost", ".corrupt"):
                self.findings.append(Note(entry.suffix[1:], entry, None, "set aside, never read"))
            elif entry.name not in known:
                self.findings.append(Note("foreign", entry, None, "not a file of a store"))
        try:  # none while nobody has the store open
            with File(path / "hints") as file:
                raw = file.read(0, HINTS.size).tobytes()
            check(HINTS.read(raw.ljust(HINTS.size, b"\0")), self._identity(b"MSQHINT1"))
        except (Invalid, StorageError) as error:
            if getattr(error, "errno", None) != errno.ENOENT:
                text = f"not used: {error}; the next first open makes them anew"
                self.findings.append(Note("hints", path / "hints", None, text))
        if (path / "dedup").exists():
            try:
                ids = self.store.store_id, self.info.queue_id
                self.findings += dedup.findings(path / "dedup", *ids)
            except StorageError as error:
                self.findings.append(unreadable(path / "dedup", error))
        if self.info.poison:
            text = "a sync failed; the next first open verifies it"
            self.findings.append(Note("poisoned", path / "slots", 136, text))

    # messages

    def words(self) -> Iterator[tuple[int, Array]]:
        """Yield (first slot, state words) of each extent in use."""
        if not self.usable or self.slots is None:
            return
        for first in range(0, self.info.slot_count, EXTENT_SLOTS):
            count = min(EXTENT_SLOTS, self.info.slot_count - first)
            raw = self.slots.read(self.info.word_at(first), 8 * count).tobytes()
            yield first, np.frombuffer(raw[: len(raw) // 8 * 8], "<u8")

    def events(self) -> Iterator[Message | Finding]:
        """Yield each message in the order of slots, with findings where they are found."""
        yield from self.findings
        ids, used, before = array("Q"), 0, len(self.findings)
        for first, words in self.words():
            states = words >> np.uint64(59)
            for state, count in zip(*np.unique(states, return_counts=True), strict=True):
                self.counts[STATES.get(int(state), "invalid")] += int(count)
            wanted = ~np.isin(states, [FREE, WRITING, SPARE])
            for index in np.flatnonzero(wanted).tolist():
                for event in self.examine(first + index, int(words[index])):
                    if isinstance(event, Message):
                        ids.append(event.id)
                        used += len(event.blocks)
                    else:
                        before += 1
                    yield event
        yield from self._accounts(ids, used, sound=before == len(self.findings))

    def examine(self, slot: int, value: int) -> Iterator[Message | Finding]:
        """Yield the message of a slot, or what is wrong with it; nothing if it is over by now."""
        path, at = self.info.path / "slots", self.info.word_at(slot)
        for attempt in range(TRIES):
            word = Word(value)
            if word.state in (FREE, WRITING, SPARE):
                return
            try:
                if word.state not in STATES:
                    bad = Invalid("a state of", "an even number of bits", f"word {value:016x}")
                    raise Damaged(bad, path, at)
                yield self.message(slot, word)
                return
            except NeverPut as never:
                text = f"slot {slot} is {STATES[word.state]}, its put never was: {never}"
                advice = "millstream repair frees the slot"
                found: Finding = Note("unput", path, at, text)
                if self.trusted:
                    bad = Invalid("reuse", word.reuse, f"{never}")
                    found = bad.problem("message", path, at, advice)
            except Damaged as damaged:
                advice = "millstream repair makes it a dead letter"
                found = damaged.bad.problem("message", damaged.path, damaged.position, advice)
                if word.state == DEAD and self.buried(slot, word.reuse):
                    text = f"slot {slot} is a dead letter that is damaged: {damaged}"
                    found = Note("buried", path, self.info.slot_at(slot), text)
            if not self.store.alive or attempt + 1 == TRIES:
                break
            self._follow_growth()
            fresh = struct.unpack("<Q", self.fresh(self.slots, at, 8))[0]
            if fresh == value and attempt:
                break
            value = fresh
        yield found

    def _follow_growth(self) -> None:
        """Take over the number of blocks, which a living process may have raised."""
        if self.blocks is not None:
            count = struct.unpack("<I", self.fresh(self.blocks, 128, 4))[0]
            room = (self.blocks.size - PAGE) // (EXTENT_BLOCKS * (8 + PAGE)) * EXTENT_BLOCKS
            if self.info.block_count < count <= min(room, BLOCK_COUNT_MAX):
                self.info = replace(self.info, block_count=count)

    def fresh(self, file: File | None, position: int, size: int) -> bytes:
        """Read bytes of now, past the window; zeros where the file ends."""
        if file is None:
            return bytes(size)
        try:
            return os.pread(file.fd, size, position).ljust(size, b"\0")
        except OSError as error:
            raise StorageError(error.errno, error.strerror, str(file.path)) from None

    def message(self, slot: int, word: Word) -> Message:
        """Return the message of a slot; raises NeverPut or Damaged."""
        info, path, at = self.info, self.info.path / "slots", self.info.slot_at(slot)
        raw = self.fresh(self.slots, at, info.slot_bytes)
        fields = SLOT.read(raw)
        if fields["reuse"] != word.reuse:
            raise NeverPut(f"reuse {fields['reuse']} where the word has {word.reuse}")
        seed = info.seed(slot, word.reuse)
        lengths = [fields[f"{what}_length"] for what in ("key", "headers", "payload")]
        total, room = sum(lengths), info.slot_bytes - SLOT.size
        inline = fields["first_block"] == 0
        try:
            if fields["slot"] != slot:
                raise Invalid("slot", slot, fields["slot"])
            most = room if inline else info.block_count * PAGE
            if total > most or (not inline and total <= room) or lengths[0] > KEY_BYTES_MAX:
                what = "lengths of key, headers, payload"
                raise Invalid(what, f"that fit {most} bytes", lengths)
            content = raw[SLOT.size : SLOT.size + total] if inline else b""
            right = hash64(raw[8 : SLOT.size] + content, seed)
            if fields["hash"] != right:
                raise Invalid("hash", f"{right:016x}", f"{fields['hash']:016x}")
            if word.lane >= info.config["priorities"]:
                raise Invalid("lane below", info.config["priorities"], word.lane)
        except Invalid as bad:
            raise Damaged(bad, path, at) from None
        chain: list[int] = []
        if not inline:
            content, chain = self._content(slot, word.reuse, fields["first_block"] - 1, total)
            right = content_hash(content, lengths, seed)
            if fields["content_hash"] != right:
                wrong = Invalid("content hash", f"{right:016x}", f"{fields['content_hash']:016x}")
                raise Damaged(wrong, info.path / "blocks", block_at(chain[0]))
        try:
            headers = headers_of(content[lengths[0] : lengths[0] + lengths[1]])
        except Invalid as bad:
            raise Damaged(bad, path, at) from None
        return Message(
            queue=info.name,
            slot=slot,
            state=STATES[word.state],
            lane=word.lane,
            attempts=word.attempts,
            reuse=word.reuse,
            tick=word.tick,
            key=content[: lengths[0]] if fields["key_hash"] else None,
            headers=headers,
            payload=content[lengths[0] + lengths[1] :],
            blocks=chain,
            failures=self.failures_of(slot, word.reuse, fields["id"]),
            **{name: fields[name] for name in ("id", "put_at", "due", "expires")},
        )

    def _content(self, slot: int, reuse: int, block: int, total: int) -> tuple[bytes, list[int]]:
        """Return the content of a chain of blocks, and their numbers."""
        path, count = self.info.path / "blocks", -(-total // PAGE)
        parts: list[bytes] = []
        chain: list[int] = []
        while len(chain) < count:
            if not 0 <= block < self.info.block_count:
                bad = Invalid("a block below", self.info.block_count, block)
                raise Damaged(bad, path, block_word_at(chain[-1]) if chain else 0)
            at = block_word_at(block)
            word = struct.unpack("<Q", self.fresh(self.blocks, at, 8))[0]
            owner = (word >> 24 & (1 << 26) - 1, word >> 50 & 1023)
            if owner != (slot + 1, reuse):
                bad = Invalid("block of slot + 1 and reuse", (slot + 1, reuse), owner)
                raise Damaged(bad, path, at)
            chain.append(block)
            parts.append(self.fresh(self.blocks, block_at(block), PAGE))
            block = (word & (1 << 24) - 1) - 1
        if block != -1:
            bad = Invalid("an end of the chain after", f"{count} blocks", f"block {block}")
            raise Damaged(bad, path, block_word_at(chain[-1]))
        return b"".join(parts)[:total], chain

    def failures_of(self, slot: int, reuse: int, message_id: int) -> list[Failure]:
        """Return the valid failure records of a message, the newest first."""
        found: list[Failure] = []
        for which in range(2):
            raw = self.fresh(self.failures, self.info.failure_at(slot, which), FAILURE_BYTES)
            fields = FAILURE.read(raw)
            if fields["id"] != message_id or not any(raw[:8]):
                continue
            right = hash64(raw[8:], self.info.seed(slot, reuse))
            lengths = (fields["first_length"], fields["last_length"])
            if fields["hash"] != right or max(lengths) > TEXT_BYTES_MAX:
                continue
            kind = KINDS.get(fields["kind"], str(fields["kind"]))
            times = (fields["attempts"], fields["first_at"], fields["last_at"])
            texts = (fields["first"][: lengths[0]], fields["last"][: lengths[1]])
            found.append(Failure(kind, *times, *(text.decode(errors="replace") for text in texts)))
        return sorted(found, key=lambda one: (-one.last_at, -one.attempts))

    def buried(self, slot: int, reuse: int) -> bool:
        """Whether a slot's newest failure record says that its message is damaged."""
        raw = self.fresh(self.slots, self.info.slot_at(slot), SLOT.size)
        found = self.failures_of(slot, reuse, SLOT.read(raw)["id"])
        return bool(found) and any(one.kind == KINDS[DAMAGED] for one in found)

    # what must add up

    def _accounts(self, ids: array[int], used: int, *, sound: bool) -> Iterator[Finding]:
        path = self.info.path / "slots"
        values, counts = np.unique(np.frombuffer(ids, "<u8"), return_counts=True)
        for one in [] if self.store.alive else values[counts > 1].tolist():
            bad = Invalid(f"id {one}", "once", "twice or more")
            yield bad.problem("twice", path, None, "cancel all but one of them")
        if self.store.alive or not self.usable:
            return
        capacity, dead = self.info.config["capacity"], self.counts["dead"]
        spare = max(0, self.info.slot_count - capacity - dead)
        if self.counts["spare"] != spare:
            text = f"{self.counts['spare']} spare slots, not {spare} (dead: {dead}); a sweep mends"
            yield Note("spare", path, None, text)
        if dead > self.info.config["dead_limit"]:
            limit = self.info.config["dead_limit"]
            yield Note("dead", path, None, f"{dead} dead letters, above the limit of {limit}")
        taken = self._taken_blocks()
        if sound and taken > used:
            text = f"{taken - used} blocks are taken and in no chain; free when their slots are"
            yield Note("leaked", self.info.path / "blocks", None, text)

    def _taken_blocks(self) -> int:
        """Return how many blocks name a slot that has a message of their reuse."""
        if not self.info.block_count or self.blocks is None:
            return 0
        words = np.concatenate([np.empty(0, "<u8"), *(words for _, words in self.words())])
        taken = 0
        for first in range(0, self.info.block_count, EXTENT_BLOCKS):
            count = min(EXTENT_BLOCKS, self.info.block_count - first)
            raw = self.fresh(self.blocks, block_word_at(first), 8 * count)
            block = np.frombuffer(raw, "<u8")
            slot = (block >> np.uint64(24) & np.uint64((1 << 26) - 1)).astype(np.int64) - 1
            inside = (slot >= 0) & (slot < len(words))
            block, owner = block[inside], words[slot[inside]]
            same = (block >> np.uint64(50) ^ owner >> np.uint64(40)) & np.uint64(1023) == 0
            taken += int((same & np.isin(owner >> np.uint64(59), HOLDING)).sum())
        return taken
