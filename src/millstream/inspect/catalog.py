"""Store, streams and segments: the files that say what there is. No batch is read here."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millstream.errors import NotFound, StorageError
from millstream.inspect.layout import (
    ACTIVATION,
    JOURNAL,
    JSON_BYTES_MAX,
    LEFT,
    MEMBERS,
    NAME,
    SEGMENT,
    File,
    Finding,
    Invalid,
    Note,
    Problem,
    hash64,
)


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A segment with its activation record. `end_position`: None in the active one without a tail.

    `link_broken`: its predecessor is not there though older segments are.
    """

    stream: str
    partition: int
    path: Path
    number: int
    size: int
    data_position: int
    index_count: int
    created: int
    salt: int
    base_offset: int
    base_position: int
    epoch: int
    predecessor: int
    predecessor_hash: int
    activated: int
    timestamp_max: int
    active: bool = False
    end_position: int | None = None
    link_broken: bool = False

    @property
    def limit_position(self) -> int:
        """The position at which its file ends."""
        return self.base_position + self.size - self.data_position

    def file_position(self, position: int) -> int:
        """Return the byte of the file that holds a position of the log."""
        return position - self.base_position + self.data_position


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream as `stream.json` has it, and its activated segments by partition, oldest first."""

    name: str
    path: Path
    stream_id: int
    config: dict[str, Any]
    partitions: dict[int, list[SegmentInfo]]


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A store as `store.json` has it. `alive`: some process has it open now."""

    path: Path
    store_id: bytes
    generation: int
    clean: bool
    durability: str
    alive: bool
    streams: dict[str, StreamInfo]


STORE_JSON = {"store_id": str, "generation": int, "clean": bool, "durability": str}
STREAM_JSON = {"stream_id": str, "partitions": int, "segment_bytes": int}


def read_json(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a JSON file whose checksum is right and whose fields have these types."""
    with File(path) as file:
        if file.size > JSON_BYTES_MAX:
            raise Invalid("size of at most", JSON_BYTES_MAX, file.size)
        raw = bytes(file.read(0, file.size))
    try:
        whole = json.loads(raw)
        checksum = whole["checksum"]
        body = whole["body"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise Invalid("a JSON object with", "body and checksum", found) from None
    if checksum != (right := f"{hash64(text.encode()):016x}"):
        raise Invalid("checksum", right, checksum)
    if not isinstance(body, dict):
        raise Invalid("a body that is", "an object", type(body).__name__)
    fields: dict[str, Any] = body
    version = fields.get("format")
    if version != 1:
        raise Invalid("format", 1, version, newer=isinstance(version, int) and version > 1)
    for name, kind in kinds.items():
        value = fields.get(name)
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
            raise Invalid(f"{name} of type", kind.__name__, value)
    for name, digits in (("store_id", 32), ("stream_id", 16), ("queue_id", 16)):
        if name in kinds and not re.fullmatch(f"[0-9a-f]{{{digits}}}", fields[name]):
            raise Invalid(name, f"{digits} hex digits", fields[name])
    return fields


def probe(fd: int, start: int, length: int) -> int | None:
    """Return the first byte in a range that another opener holds a lock on, or None."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
    return None if answer[0] == fcntl.F_UNLCK else int(answer[2])


def check_members(path: Path, store_id: bytes) -> bool:
    """Return whether any process has the store open; raises Invalid or StorageError."""
    with File(path / "members") as file:
        if file.size < 64:
            raise Invalid("size of at least", 64, file.size)
        fields = MEMBERS.read(file.read(0, 64))
        expected = {"magic": b"MSMEMBR1", "version": 1, "count": 1024, "store_id": store_id}
        for name, value in expected.items():
            if fields[name] != value:
                raise Invalid(name, value, fields[name])
        return probe(file.fd, 64, 64 * fields["count"]) is not None


def require(path: Path) -> None:
    """Raise NotFound where there is nothing of a store: neither whole nor damaged."""
    if not {"store.json", "members", "streams", "queues"} & {one.name for one in listing(path)}:
        why = "it has no file of one" if path.exists() else "there is no such directory"
        raise NotFound(f"no store in {path}: {why}")


def open_store(path: Path) -> tuple[StoreInfo, list[Finding]]:
    """Read `store.json` and see who is alive; no streams yet. Raises Invalid or StorageError."""
    body = read_json(path / "store.json", STORE_JSON)
    identity = bytes.fromhex(body["store_id"])
    findings: list[Finding] = []
    try:
        alive = check_members(path, identity)
    except (Invalid, StorageError) as error:
        alive = False
        findings.append(Note("members", path / "members", None, f"cannot be used: {error}"))
    if not body["clean"]:
        why = (
            "a process has it open" if alive else "the next open raises the generation and walks it"
        )
        findings.append(Note("unclean", path / "store.json", None, f"not closed cleanly: {why}"))
    found = (body["generation"], body["clean"], body["durability"], alive)
    return StoreInfo(path, identity, *found, {}), findings


def open_stream(path: Path) -> StreamInfo:
    """Read `stream.json`, no segments yet. Raises Invalid or StorageError."""
    body = read_json(path / "stream.json", STREAM_JSON)
    return StreamInfo(path.name, path, int(body["stream_id"], 16), body, {})


def stream_paths(path: Path, only: str | None) -> list[Path]:
    """Return the directories of the streams, sorted by name; NotFound if `only` is not one."""
    top = path / "streams"
    if only is not None:
        if not is_stream(only) or not (top / only).is_dir():
            raise NotFound(f"no stream {only!r} in {path}")
        return [top / only]
    found = [entry for entry in listing(top) if entry.is_dir() and is_stream(entry.name)]
    return [entry for entry in found if not (entry / LEFT).exists()]


def is_stream(name: str) -> bool:
    """Is it the name of a stream, or of the journal?"""
    return name == JOURNAL or NAME.fullmatch(name) is not None


def partition_numbers(stream: StreamInfo) -> list[int]:
    """Return the partitions that have a directory."""
    names = [entry.name for entry in listing(stream.path) if re.fullmatch(r"\d{5}", entry.name)]
    return [int(name) for name in names if int(name) < stream.config["partitions"]]


def listing(path: Path) -> list[Path]:
    """Return the entries of a directory by name; none where there is no directory."""
    try:
        return sorted(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(error.errno, error.strerror, str(path)) from None


def unreadable(path: Path, error: OSError) -> Problem:
    """Return a file that cannot be read as a finding."""
    advice = "check permissions, the disk and the kernel's log"
    return Problem("unreadable", path, None, None, "a file that can be read", str(error), advice)


def linked_elsewhere(top: Path) -> Problem | None:
    """Return the first file of a store that has a name outside of its directory, as a finding.

    Names beside its own are ours: a file has two for a moment when it is made or replaced.
    """
    found: list[tuple[Path, int]] = []
    folders = [top, *(top / name for name in ("streams", "queues"))]
    while folders:
        folder = folders.pop()
        for path in listing(folder):
            with suppress(FileNotFoundError):
                state = path.lstat()
                if stat.S_ISDIR(state.st_mode) and folder != top:
                    folders.append(path)
                elif stat.S_ISREG(state.st_mode) and state.st_nlink > 1 and _has_others(path):
                    found.append((path, state.st_nlink))
    if not found:
        return None
    path, names = min(found)
    advice = "a snapshot by hard links (cp -al) shares it, and no open goes on with it: remove the"
    advice += " other names, or make one of the two directories a copy of its own (cp -a)"
    text = f"{names}, as of {len(found)} files of this store"
    return Problem("linked", path, None, None, "a file of one name", text, advice)


def _has_others(path: Path) -> bool:
    """Has a file names outside of its directory? Those in it may come or go meanwhile."""
    for _ in range(3):
        state = path.lstat()
        inodes = [entry.inode() for entry in os.scandir(path.parent)]
        if inodes.count(state.st_ino) >= state.st_nlink:
            return False
    return True


def read_segment(path: Path, store: StoreInfo, stream: StreamInfo, partition: int) -> Any:
    """Return (SegmentInfo or None for a spare, finding or None); raise Invalid on a bad header."""
    with File(path) as file:
        head = file.read(0, SEGMENT.size)
        if len(head) < SEGMENT.size:
            raise Invalid("size of at least", SEGMENT.size, file.size)
        fields = SEGMENT.read(head)
        right = hash64(head[:80])
        newer = fields["checksum"] == right and fields["magic"] == b"MSSEGMT1"
        identity = (store.store_id, stream.stream_id, partition, int(path.stem))
        expected = dict(
            zip(("store_id", "stream_id", "partition", "number"), identity, strict=True)
        )
        expected = {"magic": b"MSSEGMT1", "version": 1, "checksum": right, **expected}
        for name, value in {**expected, "size": file.size}.items():
            if fields[name] != value:
                raise Invalid(name, value, fields[name], newer=newer and name == "version")
        data = fields["data_position"]
        if data % 4096 or not 8192 + 16 * fields["index_count"] <= data <= file.size:
            raise Invalid("data_position", "a page behind the index, in the file", data)
        raw = file.read(4096, ACTIVATION.size)
    record = ACTIVATION.read(raw)
    names = ("number", "size", "data_position", "index_count", "created", "salt")
    where = {"stream": stream.name, "partition": partition, "path": path}
    segment = {**where, **{name: fields[name] for name in names}}
    if not any(raw):
        return None, Note("spare", path, None, "a segment that was never activated")
    right = hash64(raw[8:], fields["salt"])
    sane = record["number"] == fields["number"] and record["base_position"] % 8 == 0
    if record["checksum"] != right or not sane:
        kind = Note("spare", path, 4096, "its activation was begun and not finished")
        if record["checksum"] != 0:
            bad = Invalid("checksum", f"{right:016x}", f"{record['checksum']:016x}")
            return None, bad.problem("activation", path, 4096, "millstream repair may rebuild it")
        return None, kind
    del record["checksum"]
    return SegmentInfo(**{**segment, **record}), None
