"""The walk along a partition: which segments belong to it, and where its log ends and why."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from millstream.errors import StorageError
from millstream.inspect.catalog import (
    SegmentInfo,
    StoreInfo,
    StreamInfo,
    listing,
    read_segment,
    unreadable,
)
from millstream.inspect.columns import Batch, decode
from millstream.inspect.layout import (
    BATCH,
    BATCH_BYTES_MAX,
    BLOCK,
    CONTROL,
    FILLER,
    FLAGS_KNOWN,
    LOW,
    SEGMENT,
    WINDOW_BYTES,
    File,
    Finding,
    Invalid,
    Note,
    Problem,
)

CORRUPT = 2  # of `poison`
GONE = (
    "the segment is gone or unreadable: restore it from a backup;"
    " millstream repair gives up what was in it"
)
POSITION_MAX = 1 << 62  # above: no position of a log


class Log:
    """One partition: its segments in order, where its walk ends, and what is found on the way.

    `tail` is the position that the control block gives, None where it cannot be used. `trusted`:
    whatever lies below the tail was published and must be whole (the store is clean or alive).
    """

    def __init__(self, store: StoreInfo, stream: StreamInfo, number: int) -> None:
        self.stream, self.number = stream, number
        self.path = stream.path / f"{number:05}"
        self.tail: int | None = None
        self.block: dict[str, Any] = {}
        self.trusted = False
        for _ in range(5):  # the tail is read last; a roll in between is seen as a newer segment
            self.findings: list[Finding] = []
            segments = self._load(store)
            self._read_control(store)
            newest = segments[-1].number if segments else 0
            if not (store.alive and self.block.get("active", 0) > newest):
                break
        self.segments = self._chain(segments)
        self._check_control(store)
        if not store.alive:  # else one may be activated just now
            self.findings = [self._judged(finding) for finding in self.findings]

    def _load(self, store: StoreInfo) -> list[SegmentInfo]:
        segments = []
        for path in listing(self.path):
            if path.suffix in (".tmp", ".lost", ".corrupt"):
                self.findings.append(Note(path.suffix[1:], path, None, "set aside, never read"))
            elif path.name == "sequences":
                continue
            elif not re.fullmatch(r"[0-9]{16}\.seg", path.name):
                self.findings.append(Note("foreign", path, None, "not a file of a store"))
            else:
                try:
                    segment, finding = read_segment(path, store, self.stream, self.number)
                except Invalid as bad:
                    advice = "its batches cannot be checked without it; restore it from a backup"
                    segment, finding = None, bad.problem("segment", path, 0, advice)
                except StorageError as error:
                    if error.errno == errno.ENOENT:  # retired since it was listed
                        continue
                    segment, finding = None, unreadable(path, error)
                segments += [segment] if segment else []
                self.findings += [finding] if finding else []
        return segments

    def _read_control(self, store: StoreInfo) -> None:
        path = self.stream.path / "control"
        try:
            with File(path) as file:
                fields = CONTROL.read(file.read(0, 4096).tobytes().ljust(CONTROL.size, b"\0"))
                raw = file.read(4096 + 256 * self.number, 256)
            expected = {"magic": b"MSCNTRL1", "version": 1, "store_id": store.store_id}
            for name, value in {**expected, "stream_id": self.stream.stream_id}.items():
                if fields[name] != value:
                    raise Invalid(name, value, fields[name])
            if len(raw) < 256 or self.number >= fields["partitions"]:
                raise Invalid("block of partition", self.number, f"{fields['partitions']} blocks")
            block = BLOCK.read(raw)
            walked = block["walked"] == store.generation
            if walked and store.clean and block["durable"] != block["tail"]:
                raise Invalid("durable, in a clean store,", block["tail"], block["durable"])
        except (Invalid, StorageError) as error:
            self.block, self.tail, self.trusted = {}, None, False
            self.findings.append(Note("control", path, None, f"not used: {error}"))
            return
        self.block = block
        # Where recovery found damage its tail is where that begins, and not the end of the log.
        self.tail = block["tail"] if walked and block["poison"] != CORRUPT else None
        self.trusted = walked and (store.clean or store.alive)

    def _check_control(self, store: StoreInfo) -> None:
        self.active_is_gone = False  # said at the end of the walk, which knows what is there
        if not self.block:
            return
        first, active = self.block["first_segment"], self.block["active"]
        if not self.trusted:  # an unclean store keeps only what recovery has not found
            refused = self.block["poison"] == CORRUPT and self.block["tail"] == 0
            first, active = first if refused or self.block["walked"] == 0 else 0, 0
        numbers = [segment.number for segment in self.segments]
        self.active_is_gone = active != 0 and active not in numbers
        if (
            first
            and first not in numbers
            and not store.alive
            and not (numbers and numbers[0] < first)
        ):
            path = self.path / f"{first:016}.seg"
            behind = self.segments[0].base_offset if numbers else self._last_offset()
            lost = (self.block["first_offset"], behind)
            expected = f"segment {first}, the oldest one"
            self.findings.append(
                Problem("missing", path, None, lost, expected, self._there(), GONE)
            )
            self.active_is_gone = self.active_is_gone and bool(numbers)  # or all of it is said

    def _judged(self, finding: Finding) -> Finding:
        """A spare as damage where batches in it show that its activation record was wiped out."""
        path = finding.path
        try:
            if finding.kind != "spare" or not self._was_activated(path):
                return finding
        except StorageError:  # the walk says so, where it comes to that file
            return finding
        found = "none before batches that were synced"
        advice = "millstream repair may rebuild it"
        return Problem("activation", path, 4096, None, "an activation record", found, advice)

    def _was_activated(self, path: Path) -> bool:
        with File(path) as file:
            spare = unactivated(file, self.stream.name, self.number)
            if not any(file.read(spare.data_position, BATCH.size)):
                return False
            if any(segment.predecessor == spare.number for segment in self.segments):
                return True
            walk = self.walk_before(spare.number)
            if walk is None and spare.number != 1:
                return False
            walk = walk or Walk(spare)
            segment = replace(spare, base_position=walk.position)
            try:
                walk.check(decode(file, segment, walk.position, segment.limit_position))
            except Invalid:
                return False
            later = scan(file, segment, walk.position, segment.limit_position)
            return walk.position < self._synced()[0] or any(
                batch is not None and batch.synced_position > walk.position for batch in later
            )

    def walk_before(self, number: int) -> Walk | None:
        """A walk at the end of the segment before the one with this number, or None."""
        older = [segment for segment in self.segments if segment.number < number]
        if not older:
            return None
        walk = Walk(older[-1])
        with File(older[-1].path) as file:
            # Its end may look like damage: the batch that follows tells whether it is its end.
            for _ in self.segment_events(file, len(older) - 1, walk):
                pass
        return walk

    def _there(self) -> str:
        numbers = [segment.number for segment in self.segments]
        return f"segments {numbers[0]} to {numbers[-1]}" if numbers else "no segment"

    def _last_offset(self) -> int:
        """The largest offset that the control block knows the log to have come to."""
        block = self.block
        known: list[int] = [block["durable_offset"], block["synced_offset"]]
        if block["hint_tail"] == block["tail"]:
            known.append(block["hint_offset"])
        return max(known)

    def _first_gone(self, active: int) -> Path:
        """The file behind the last segment, which is the first that is gone or unreadable."""
        first = self.segments[-1].number + 1 if self.segments else self.block["first_segment"]
        behind = (self.path / f"{number:016}.seg" for number in range(max(first, 1), active))
        gone = (path for path in behind if not os.path.lexists(path))
        return next(gone, self.path / f"{active:016}.seg")

    def active_gone(self, offset: int) -> Problem | None:
        """What is lost of a log that ends at an offset, where the files behind it are gone."""
        if not self.active_is_gone:
            return None
        active, end = self.block["active"], self._last_offset()
        lost = (offset, max(offset, end))
        expected = f"segments up to {active}, the active one"
        path = self._first_gone(active)
        return Problem("missing", path, None, lost, expected, self._there(), GONE)

    def _chain(self, segments: list[SegmentInfo]) -> list[SegmentInfo]:
        """Return the segments in order, with their ends; findings say what does not belong."""
        chain = segments[-1:]
        for segment in reversed(segments[:-1]):
            after = chain[0]
            linked = after.predecessor == segment.number
            older = after.predecessor > segment.number or after.predecessor == 0
            if (
                linked
                and not segment.base_position <= after.base_position <= segment.limit_position
            ):
                linked, older = False, True
            if not linked and not older:
                advice = "a later segment continues an earlier one: recovery was cut short"
                found = f"predecessor {after.predecessor} of segment {after.number}"
                expected = f"segment {segment.number} in the chain"
                stray = Problem("stray", segment.path, 4096, None, expected, found, advice)
                self.findings.append(stray)
                continue
            end = after.base_position if linked else None
            chain[0] = replace(after, link_broken=not linked)
            chain.insert(0, replace(segment, end_position=end))
        if chain:
            last = chain[-1]
            usable = (
                self.tail is not None and last.base_position <= self.tail <= last.limit_position
            )
            usable = usable and self.block["active"] <= last.number
            chain[-1] = replace(last, active=True, end_position=self.tail if usable else None)
        return chain

    def events(self) -> Iterator[SegmentInfo | Batch | Finding]:
        """Walk: yield each segment, then its batches, with findings where they are found."""
        sound, at, offset = True, 0, 0
        passed = False  # what is not sound is a batch: the walk went on behind it
        for event in self._events():
            if isinstance(event, Problem):
                sound, passed = False, event.kind == "batch" and (sound or passed)
            elif isinstance(event, SegmentInfo):
                at, offset = event.base_position, max(offset, event.base_offset)
            elif isinstance(event, Batch):
                at, offset = event.position + event.length, max(offset, event.next_offset)
                sound = sound or passed
            yield event
        gone = self.active_gone(offset)
        if gone is not None:
            yield gone
        elif sound:
            yield from self._not_reached(at, offset)

    def _not_reached(self, at: int, offset: int) -> Iterator[Problem]:
        """Yield what had been synced and is not there, where nothing else says so."""
        block = self.block
        synced, end = self._synced()
        if at >= synced or (self.trusted and block["poison"] != CORRUPT):
            return
        number = self.segments[-1].number if self.segments else max(block["first_segment"] - 1, 0)
        path = self.path / f"{number + 1:016}.seg"
        if os.path.lexists(path):
            path = self.path / f"{number:016}.seg"
        expected = f"the log up to position {synced}, which was synced"
        advice = "restore the files from a backup; millstream repair gives up what was in them"
        found = f"its end at position {at}"
        yield Problem("missing", path, None, (offset, end), expected, found, advice)

    def _synced(self) -> tuple[int, int]:
        """Position and offset up to which the control block says that the log was synced."""
        block = self.block
        if not block:
            return 0, 0
        synced, end = max(
            (block["durable"], block["durable_offset"]),
            (block["synced_to"], block["synced_offset"]),
        )
        return (0, 0) if synced % 8 or synced > POSITION_MAX else (synced, end)

    def _events(self) -> Iterator[SegmentInfo | Batch | Finding]:
        yield from self.findings
        walk: Walk | None = None
        for index, segment in enumerate(self.segments):
            if walk is None or segment.link_broken:
                if walk is not None:
                    yield self._gap(walk, segment)
                walk = Walk(segment)
            else:
                yield from walk.enter(segment)
            yield segment
            try:
                with File(segment.path) as file:
                    yield from self.segment_events(file, index, walk)
            except StorageError as error:
                if error.errno == errno.ENOENT and index == 0:
                    yield Note("retired", segment.path, None, "retention took it away just now")
                else:
                    yield unreadable(segment.path, error)
                walk.lost = True
            if walk.ended:
                return

    def _gap(self, walk: Walk, segment: SegmentInfo) -> Problem:
        lost = (walk.offset, segment.base_offset) if walk.offset < segment.base_offset else None
        expected = f"segment {segment.predecessor} before segment {segment.number}"
        advice = "restore it from a backup, or repair its activation record"
        path = self.path / f"{segment.predecessor:016}.seg"
        return Problem("missing", path, None, lost, expected, "none that is sound", advice)

    def segment_events(self, file: File, index: int, walk: Walk) -> Iterator[Batch | Finding]:
        """Walk one segment; says in `walk` where and how it ended."""
        segment = self.segments[index]
        ends = segment.end_position
        while walk.position < (segment.limit_position if ends is None else ends):
            stop = segment.limit_position if ends is None else ends
            try:
                batch = decode(file, segment, walk.position, stop)
                walk.check(batch)
            except Invalid as bad:
                if segment.active and ends is not None and self._beyond(file, segment, walk):
                    text = f"its tail {ends} lies within a batch that is valid; not used"
                    yield Note("control", self.stream.path / "control", None, text)
                    ends = None
                    continue
                finding, resume = self._failure(file, index, walk, bad, ends)
                if finding is not None:
                    yield finding
                if not isinstance(finding, Problem) or finding.kind == "version":
                    following = self.segments[index + 1 : index + 2]
                    walk.ended = not (following and following[0].link_broken)
                    return
                walk.lost = True
                if resume is None:
                    walk.ended = index + 1 == len(self.segments)
                    return
                walk.resume(resume)
                continue
            yield batch
            walk.pass_over(batch)

    def _beyond(self, file: File, segment: SegmentInfo, walk: Walk) -> bool:
        try:
            walk.check(decode(file, segment, walk.position, segment.limit_position))
        except Invalid:
            return False
        return True

    def _failure(
        self, file: File, index: int, walk: Walk, bad: Invalid, ends: int | None
    ) -> tuple[Finding | None, Batch | None]:
        """Tell corruption from a torn tail at walk.position; the batch where a walk can go on."""
        segment, position = self.segments[index], walk.position
        at = segment.file_position(position)
        if bad.newer:
            return bad.problem("version", segment.path, at), None
        published = self.trusted and ends is not None
        stop = ends if ends is not None and (published or not segment.active) else None
        limit = segment.limit_position if stop is None else stop
        resume, proof = self._search_further(file, index, walk, limit)
        following = self.segments[index + 1 : index + 2]
        gap = bool(following) and following[0].link_broken  # said where the walk comes to it
        room = segment.limit_position - position
        blank = resume is None and (room < BATCH.size or not any(file.read(at, BATCH.size)))
        if proof is None and position < self._synced()[0] and (resume or (following and not gap)):
            proof = "the control file says that this was synced"
        if blank and gap:
            return None, None
        if proof is None and not published:
            if blank:
                return None, None
            text = f"from here on nothing is proved to have been durable ({bad})"
            return Note("torn", segment.path, at, text), None
        after = resume.base_offset if resume else following[0].base_offset if following else None
        if after is None and self.block.get("hint_tail") == ends and ends is not None:
            after = self.block["hint_offset"]
        advice = f"millstream repair sets the damaged bytes aside ({proof or 'below the tail'})"
        if resume is None:
            advice = (
                f"no valid batch follows in this file: restore it ({proof or 'below the tail'})"
            )
        lost = (walk.offset, after)
        return Problem("batch", segment.path, at, lost, bad.expected, bad.found, advice), resume

    def _search_further(
        self, file: File, index: int, walk: Walk, limit: int
    ) -> tuple[Batch | None, str | None]:
        """Return the next valid batch in this segment, and what proves the failure corruption."""
        segment, position, resume = self.segments[index], walk.position, None
        for batch in scan(file, segment, position, limit):
            if batch is None:
                return resume, "too many plausible headers to search them all"
            if batch.position > position and batch.base_offset >= walk.offset:
                resume = resume or batch
            if batch.synced_position > position:
                return resume, f"the batch at {batch.position} was written when this was durable"
        for later in self.segments[index + 1 :]:
            at, stop = later.base_position, later.end_position or later.limit_position
            try:
                with File(later.path) as other:
                    while at < stop:
                        batch = decode(other, later, at, stop)
                        if batch.synced_position > position:
                            name = later.path.name
                            return resume, f"a batch of {name} was written when this was durable"
                        at += batch.length
            except (Invalid, StorageError):
                continue
        return resume, None


class Walk:
    """What the log must go on with: position, chain, next offset, largest timestamp."""

    def __init__(self, segment: SegmentInfo) -> None:
        self.ended = False  # no more batches, by a torn tail or for want of a place to go on
        self._begin(segment)

    def _begin(self, segment: SegmentInfo) -> None:
        self.position = segment.base_position
        self.hash, self.chain = segment.predecessor_hash, segment.predecessor_hash & LOW
        self.offset, self.timestamp_max = segment.base_offset, segment.timestamp_max
        self.exact = True  # timestamp_max is known, nothing was lost since
        self.lost = False  # what came last is not known
        self.filler = False
        self.epoch = segment.epoch

    def enter(self, segment: SegmentInfo) -> Iterator[Problem]:
        """Go over to the successor, which must begin with what the predecessor ended with."""
        pairs: list[tuple[str, object, object]] = []
        mine, theirs = self.hash, segment.predecessor_hash
        if self.filler:  # it stands for the batch whose low half it carries
            mine, theirs = self.chain, theirs & LOW
        if not self.lost and mine != theirs:
            pairs.append(("predecessor's hash", f"{mine:x}", f"{theirs:x}"))
        if segment.base_offset < self.offset:
            pairs.append(("base offset of at least", self.offset, segment.base_offset))
        if segment.epoch < self.epoch:
            pairs.append(("epoch of at least", self.epoch, segment.epoch))
        if self.exact and not self.lost and segment.timestamp_max != self.timestamp_max:
            pairs.append(("largest timestamp", self.timestamp_max, segment.timestamp_max))
        for what, expected, found in pairs:
            bad = Invalid(what, expected, found)
            yield bad.problem("activation", segment.path, 4096, "restore it from a backup")
        self._begin(segment)

    def check(self, batch: Batch) -> None:
        """Raise Invalid unless the batch continues the log, by rules (7) and (8)."""
        if batch.chain != self.chain:
            raise Invalid("chain", f"{self.chain:08x}", f"{batch.chain:08x}")
        if batch.base_offset < self.offset:
            raise Invalid("base offset of at least", self.offset, batch.base_offset)

    def resume(self, batch: Batch) -> None:
        """Go on at a batch behind damaged bytes."""
        self.position, self.chain, self.exact, self.lost = batch.position, batch.chain, False, False

    def pass_over(self, batch: Batch) -> None:
        """Go on behind a batch that continued the log."""
        self.position += batch.length
        self.hash, self.chain, self.filler = batch.hash, batch.link, bool(batch.flags & FILLER)
        self.offset = max(self.offset, batch.next_offset)
        self.exact = self.exact and not self.filler
        self.lost = False
        if batch.count:
            self.timestamp_max = max(self.timestamp_max, batch.timestamp_max)


def unactivated(file: File, stream: str, partition: int) -> SegmentInfo:
    """Return what the header page says of a segment: as if activated at the begin of a log."""
    fields = SEGMENT.read(file.read(0, SEGMENT.size))
    names = ("number", "size", "data_position", "index_count", "created", "salt")
    return SegmentInfo(
        stream=stream,
        partition=partition,
        path=file.path,
        **{name: fields[name] for name in names},
        base_offset=0,
        base_position=0,
        epoch=1,
        predecessor=0,
        predecessor_hash=0,
        activated=fields["created"],  # not known; it cannot be earlier
        timestamp_max=-(1 << 63),
    )


def scan(file: File, segment: SegmentInfo, position: int, end: int) -> Iterator[Batch | None]:
    """Yield valid batches at any multiple of 8 from a position on; None: gave up the search."""
    go_on = position
    for block in range(position, end - BATCH.size + 1, WINDOW_BYTES // 2):
        words = file.read(segment.file_position(block) + 8, WINDOW_BYTES // 2).tobytes()
        word = np.frombuffer(words[: len(words) // 8 * 8], "<u8")
        length = word & LOW
        plausible = (word >> 32 & 0xFFFF == 1) & (word >> 48 <= FLAGS_KNOWN)
        plausible &= (length >= BATCH.size) & (length % 8 == 0)
        for index in np.flatnonzero(plausible):
            at = block + 8 * int(index)
            if at < go_on or at + int(length[index]) > end:
                continue
            file.search_bytes -= min(int(length[index]), BATCH_BYTES_MAX)
            if file.search_bytes < 0:
                yield None
                return
            try:
                batch = decode(file, segment, at, end)
            except Invalid:
                continue
            go_on = at + batch.length
            yield batch
