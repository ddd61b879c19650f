"""The files of consumer groups: headers and positions, read without the core."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from millstream.errors import StorageError
from millstream.inspect.catalog import StoreInfo, StreamInfo, listing, unreadable
from millstream.inspect.layout import NAME, File, Finding, Invalid, Layout, Note, hash64

HEADER = Layout(
    "8sII16sQQQQIIQII",
    "magic version members store_id stream_id group_id salt checksum state poison generation"
    " partitions changes",
)
COPY = Layout("QQQQQ", "checksum sequence epoch offset transaction")
SUFFIX = ".group"
MEMBERS, MEMBERS_AT, MEMBER_BYTES = 256, 4096, 64
PARTITIONS_AT = MEMBERS_AT + MEMBERS * MEMBER_BYTES
PARTITION_BYTES, COPIES_AT, COPY_BYTES = 192, 64, 64
DROPPED = 2
TRIES = 4  # how often a position that a living process may be changing is read


class Position(NamedTuple):
    """Where a group goes on in a partition, and how many of its two copies are whole."""

    epoch: int
    offset: int
    whole: int


def group_paths(stream: StreamInfo) -> list[Path]:
    """The files of a stream's groups, sorted by name."""
    found = listing(stream.path / "groups")
    return [path for path in found if path.suffix == SUFFIX and NAME.fullmatch(path.stem)]


def read_header(file: File, store: StoreInfo, stream: StreamInfo) -> dict[str, int]:
    """Return the fields of a header; raises Invalid."""
    raw = file.read(0, 4096).tobytes()
    if len(raw) < 4096:
        raise Invalid("size of at least", PARTITIONS_AT, file.size)
    fields = HEADER.read(raw)
    right = hash64(raw[:56])
    ids = {"store_id": store.store_id, "stream_id": stream.stream_id, "members": MEMBERS}
    expected = {"magic": b"MSGROUP1", "checksum": right, "version": 1, **ids}
    newer = fields["checksum"] == right and fields["magic"] == b"MSGROUP1"
    for name, value in expected.items():
        if fields[name] != value:
            raise Invalid(name, value, fields[name], newer=newer and name == "version")
    end = PARTITIONS_AT + fields["partitions"] * PARTITION_BYTES
    if end > file.size:
        raise Invalid("size of at least", end, file.size)
    return fields


def position_of(file: File, salt: int, partition: int) -> Position | None:
    """Return the position of a partition, None where there was never one; raises Invalid."""
    at = PARTITIONS_AT + partition * PARTITION_BYTES + COPIES_AT
    for _ in range(TRIES):
        raw = os.pread(file.fd, 2 * COPY_BYTES, at)
        copies = [COPY.read(raw[i * COPY_BYTES :]) for i in range(2)]
        rights = [hash64(raw[i * COPY_BYTES + 8 : i * COPY_BYTES + 40], salt + partition)
                  for i in range(2)]  # fmt: skip
        whole = [
            copy
            for copy, right in zip(copies, rights, strict=True)
            if copy["sequence"] and copy["checksum"] == right
        ]
        if whole:
            newest = max(whole, key=lambda copy: copy["sequence"])
            torn = sum(any(copy.values()) for copy in copies) - len(whole)
            return Position(newest["epoch"], newest["offset"], 2 - torn)
        if not any(copy["checksum"] for copy in copies):
            return None  # the first one of all may have been begun
    raise Invalid("a position that is", "whole in one of two copies", "two torn ones")


def findings(path: Path, store: StoreInfo, stream: StreamInfo) -> Iterator[Finding]:
    """Yield what is wrong with the file of a group."""
    with File(path) as file:
        try:
            fields = read_header(file, store, stream)
        except Invalid as bad:
            advice = "restore it from a backup, or remove it: then the group begins anew"
            yield bad.problem("group", path, 0, advice)
            return
        if fields["state"] == DROPPED:
            yield Note("group", path, None, "it was being removed")
            return
        if fields["poison"]:
            yield Note("group", path, 68, "a sync of it failed; the next first open writes it anew")
        if fields["partitions"] > stream.config["partitions"]:
            expected = f"at most {stream.config['partitions']} partitions"
            more = Invalid("", expected, fields["partitions"])
            yield more.problem("group", path, 80, "is it the file of another stream?")
            return
        for partition in range(fields["partitions"]):
            at = PARTITIONS_AT + partition * PARTITION_BYTES + COPIES_AT
            try:
                position = position_of(file, fields["salt"], partition)
            except Invalid as bad:
                where = str(store.path), stream.name, path.stem, "earliest", "-p", str(partition)
                advice = f"set it with `{shlex.join(('millstream', 'groups', 'seek', *where))}`"
                yield bad.problem("position", path, at, advice)
                continue
            if position is not None and position.whole < 2 and not store.alive:
                text = f"a copy of the position of partition {partition} is torn; the other counts"
                yield Note("position", path, at, text)


def verify(store: StoreInfo, stream: StreamInfo) -> Iterator[Finding]:
    """Yield what is wrong with the groups of a stream."""
    for path in group_paths(stream):
        try:
            yield from findings(path, store, stream)
        except StorageError as error:
            yield unreadable(path, error)
