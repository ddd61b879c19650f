"""Idempotent producers: who is registered, and what was saved of their sequences beside the log."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from millstream.errors import StorageError
from millstream.inspect.catalog import SegmentInfo, StoreInfo, StreamInfo, unreadable
from millstream.inspect.columns import Batch
from millstream.inspect.layout import FILLER, LOW, File, Finding, Invalid, Layout, hash64
from millstream.inspect.walk import Log

PRODUCERS = Layout("8sII16sQQQ", "magic version _ store_id stream_id _ checksum")
ENTRY = Layout("QII", "checksum number length")
SEQUENCES = Layout(
    "8sII16sQQQII", "magic version partition store_id stream_id position hash count _"
)
SAVED = struct.Struct("<IIQQ")
HEADER_BYTES = 72  # of `sequences`, with its checksum
ID_BYTES_MAX = 512
MORE = 1 << 63
AGAIN = "millstream repair makes one from the headers that are left"
BACKUP = "restore it from a backup; ids and numbers cannot be guessed"


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file `sequences` says: by producer (last, whole), each a sequence + 1."""

    position: int
    hash: int
    entries: dict[int, tuple[int, int]]


def read_ids(store: StoreInfo, stream: StreamInfo) -> list[str]:
    """Return the registered ids in the order of their numbers, from 1; raises Invalid."""
    path = stream.path / "producers"
    if not os.path.lexists(path):
        return []
    with File(path) as file:
        raw = file.read(0, file.size).tobytes()
    check_header(PRODUCERS, raw, {"magic": b"MSPRODU1", **identity(store, stream)})
    if (right := hash64(raw[: PRODUCERS.size - 8])) != PRODUCERS.read(raw)["checksum"]:
        raise Invalid("checksum", f"{right:016x}", "another")
    ids: list[str] = []
    at = PRODUCERS.size
    while len(raw) - at >= ENTRY.size:
        entry = ENTRY.read(raw[at:])
        begin, length = at + ENTRY.size, entry["length"]
        end = begin + length + -length % 8
        if entry["number"] != len(ids) + 1 or not 0 < length <= ID_BYTES_MAX or end > len(raw):
            break
        if hash64(raw[at + 8 : end]) != entry["checksum"]:
            break
        ids.append(raw[begin : begin + length].decode("utf-8", "replace"))
        at = end
    if len(raw) - at > ENTRY.size + ID_BYTES_MAX:
        raise Invalid(f"a valid entry at byte {at}, or the end,", "", "other entries behind it")
    return ids


def read_saved(store: StoreInfo, log: Log) -> Saved | None:
    """Return what was saved of a partition, None where there is no file; raises Invalid."""
    path = log.path / "sequences"
    if not os.path.lexists(path):
        return None
    with File(path) as file:
        raw = file.read(0, file.size).tobytes()
    expected = {"magic": b"MSSEQNC1", "partition": log.number, **identity(store, log.stream)}
    fields = check_header(SEQUENCES, raw, expected)
    entries = raw[HEADER_BYTES : HEADER_BYTES + SAVED.size * fields["count"]]
    right = hash64(raw[: SEQUENCES.size] + entries)
    found = int.from_bytes(raw[SEQUENCES.size : HEADER_BYTES], "little")
    if len(entries) != SAVED.size * fields["count"] or right != found:
        raise Invalid("checksum", f"{right:016x}", f"{found:016x}")
    table = {number: (last, whole) for number, _, last, whole in SAVED.iter_unpack(entries)}
    return Saved(fields["position"], fields["hash"], table)


def identity(store: StoreInfo, stream: StreamInfo) -> dict[str, object]:
    """Return what each header repeats."""
    return {"version": 1, "store_id": store.store_id, "stream_id": stream.stream_id}


def check_header(layout: Layout, raw: bytes, expected: dict[str, object]) -> dict[str, int]:
    """Return the fields of a header that is what it should be; raises Invalid."""
    if len(raw) < layout.size:
        raise Invalid("size of at least", layout.size, len(raw))
    fields = layout.read(raw)
    for name, value in expected.items():
        if fields[name] != value:
            raise Invalid(name, value, fields[name], newer=name == "version")
    return fields


class Sequences:
    """What was saved of a partition, held against its batches as they come."""

    def __init__(self, store: StoreInfo, log: Log) -> None:
        self.path = log.path / "sequences"
        self.findings: list[Finding] = []
        self.saved: Saved | None = None
        try:
            self.saved = read_saved(store, log)
        except Invalid as bad:
            self.findings.append(bad.problem("sequences", self.path, 0, AGAIN))
        except StorageError as error:
            self.findings.append(unreadable(self.path, error))
        self.alive = store.alive  # then it may be newer than what was listed
        self.bases = {segment.base_position: segment for segment in log.segments}
        self.end = 0
        self.seen: dict[int, int] = {}
        self.behind: set[int] = set()

    def pass_over(self, batch: Batch) -> None:
        """Check one batch."""
        self.end = batch.position + batch.length
        if batch.producer == 0 or batch.flags & FILLER:
            return
        after = (batch.sequence & ~MORE) + 1
        if after <= self.seen.get(batch.producer, 0):
            bad = Invalid("a sequence of at least", self.seen[batch.producer], after - 1)
            advice = "the hash is right: it was written like this; report it"
            self.findings.append(bad.problem("content", batch.path, batch.file_position, advice))
        self.seen[batch.producer] = after
        if self.saved is not None and batch.position < self.saved.position:
            last, _ = self.saved.entries.get(batch.producer, (0, 0))
            if last < after and batch.producer not in self.behind:
                self.behind.add(batch.producer)
                who = f"of producer {batch.producer} a sequence of at least"
                bad = Invalid(who, after - 1, last - 1)
                self.findings.append(bad.problem("sequences", self.path, None, AGAIN))

    @property
    def highest(self) -> int:
        """The highest number of a producer in log and file."""
        return max([*self.seen, *(self.saved.entries if self.saved else ())], default=0)

    def finish(self) -> Iterator[Finding]:
        """Yield what was found."""
        yield from self.findings
        if self.seen and not os.path.lexists(self.path):
            bad = Invalid("a file for the producers of the log", "", "none")
            yield bad.problem("sequences", self.path, None, "restore it from a backup")
        if self.saved is not None and not self._begins_somewhere(self.saved):
            bad = Invalid("a position where a segment begins, not", "", self.saved.position)
            yield bad.problem("sequences", self.path, None, AGAIN)

    def _begins_somewhere(self, saved: Saved) -> bool:
        segment = self.bases.get(saved.position)
        if self.alive:
            return True
        if segment is not None:
            return segment.predecessor_hash & LOW == saved.hash & LOW
        return not self.bases or saved.position == self.end


def ids_or_findings(store: StoreInfo, stream: StreamInfo) -> tuple[list[str] | None, list[Finding]]:
    """Return the registered ids, None where they cannot be read, and why."""
    path = stream.path / "producers"
    try:
        return read_ids(store, stream), []
    except Invalid as bad:
        return None, [bad.problem("producers", path, None, BACKUP)]
    except StorageError as error:
        return None, [unreadable(path, error)]


def findings_of_ids(store: StoreInfo, stream: StreamInfo, highest: int) -> Iterator[Finding]:
    """Yield what is wrong with a file of ids that must know producers up to the highest number."""
    ids, findings = ids_or_findings(store, stream)
    yield from findings
    if ids is not None and len(ids) < highest:
        bad = Invalid("at least so many ids", highest, len(ids))
        yield bad.problem("producers", stream.path / "producers", None, BACKUP)


def described_ids(store: StoreInfo, stream: StreamInfo) -> Iterator[dict[str, object]]:
    """Yield what `dump` shows of the ids of a stream's producers."""
    ids, findings = ids_or_findings(store, stream)
    for number, name in enumerate(ids or (), 1):
        yield {"item": "producer", "stream": stream.name, "number": number, "id": name}
    for finding in findings:
        yield {"item": "problem", "stream": stream.name, "text": str(finding)}


def described(store: StoreInfo, log: Log) -> Iterator[dict[str, object]]:
    """Yield what `dump` shows of what was saved of a partition."""
    where: dict[str, object] = {"stream": log.stream.name, "partition": log.number}
    try:
        saved = read_saved(store, log)
    except (Invalid, StorageError) as error:
        yield {"item": "problem", **where, "text": f"{log.path / 'sequences'}: {error}"}
        return
    if saved is not None:
        count = len(saved.entries)
        yield {"item": "sequences", **where, "position": saved.position, "count": count}
        for number, (last, whole) in saved.entries.items():
            last, whole = last - 1, whole - 1
            yield {"item": "sequence", **where, "producer": number, "last": last, "whole": whole}


def mended(store: StoreInfo, log: Log) -> tuple[Path, bytes, str] | None:
    """Return the front of a file `sequences` that takes the place of a damaged one, and a text.

    It says nothing of any producer and lets the core read every header that is left.
    """
    damaged = Sequences(store, log)
    for event in log.events():
        if isinstance(event, Batch):
            damaged.pass_over(event)
    if not any(getattr(one, "kind", "") == "sequences" for one in damaged.finish()):
        return None
    if not os.path.lexists(damaged.path):
        return None
    first: SegmentInfo | None = log.segments[0] if log.segments else None
    head = SEQUENCES.pack.pack(
        b"MSSEQNC1", 1, log.number, store.store_id, log.stream.stream_id,
        first.base_position if first else 0, first.predecessor_hash if first else 0, 0, 0,
    )  # fmt: skip
    text = "made anew: what producers sent is known from the records that are left alone"
    return damaged.path, head + struct.pack("<Q", hash64(head)), text
