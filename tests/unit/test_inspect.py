"""The second reader against stores that a builder of its own made, whole and damaged."""

import fcntl
import json
import os
import random
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import (
    ALIGN64,
    FILLER,
    FIXED,
    HEADER,
    KEY_NULLS,
    NONE,
    TIMESTAMPS,
    Log,
    Placed,
    StoreBuilder,
    flip,
    hash64,
    json_bytes,
    poke,
    put,
    seal,
)

import millstream
from millstream import inspect
from millstream.errors import CorruptBatch, NotFound, StorageError, VersionMismatch
from millstream.inspect import checking, mending, reading, repair, walk


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def log(builder: StoreBuilder) -> Log:
    return builder.stream("s").log(0)


def values_of(path: Path) -> list[bytes | None]:
    return [record.value for record in inspect.records(path)]


def kinds(report: inspect.Report) -> list[str]:
    return [problem.kind for problem in report.problems]


def notes(report: inspect.Report) -> list[str]:
    return [note.kind for note in report.notes]


def three_batches(log: Log) -> list[Placed]:
    return [log.append([bytes([65 + i]) * 20, b"x", b"yy"], synced=0) for i in range(3)]


# Whole stores -------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_written(builder: StoreBuilder, log: Log) -> None:
    log.append(
        [b"a", None, b"", b"dd"],
        keys=[None, b"k", b"", b"\xff"],
        headers=[[("h", b"v"), ("é", b"")], [], [("h", b"1")], []],
        timestamps=[5, -3, 9, 9],
    )
    log.append([b"e"], timestamps=7)
    builder.write()
    found = list(inspect.records(builder.path))
    assert [(r.offset, r.timestamp, r.key, r.value) for r in found] == [
        (0, 5, None, b"a"),
        (1, -3, b"k", None),
        (2, 9, b"", b""),
        (3, 9, b"\xff", b"dd"),
        (4, 7, None, b"e"),
    ]
    assert found[0].headers == [("h", b"v"), ("é", b"")]
    assert [record.headers for record in found[1:]] == [[], [("h", b"1")], [], []]
    assert {(record.stream, record.partition, record.epoch) for record in found} == {("s", 0, 1)}


def test_batches_have_columns_positions_and_flags(builder: StoreBuilder, log: Log) -> None:
    first = log.append([b"ab", b"cd"], timestamps=[1, 2])
    second = log.append([b"x" * 5000, b"y"], timestamps=4)
    builder.write()
    found = list(inspect.batches(builder.path, "s", 0))
    assert [batch.position for batch in found] == [first.position, second.position]
    assert [batch.file_position for batch in found] == [first.at, second.at]
    assert found[0].flags == FIXED | TIMESTAMPS
    assert found[1].flags == ALIGN64
    assert found[0].offsets.tolist() == [0, 1]
    assert found[1].offsets.dtype == np.int64
    assert found[1].timestamps.tolist() == [4, 4]
    assert found[1].keys == [None, None]
    starts = list(inspect.batches(builder.path, "s", 0, start_position=1))
    assert [batch.position for batch in starts] == [second.position]


def test_offset_column_gives_offsets_with_gaps(builder: StoreBuilder, log: Log) -> None:
    log.append([b"a", b"b"], offsets=[3, 90])
    log.append([b"c"])
    builder.write()
    assert [record.offset for record in inspect.records(builder.path)] == [3, 90, 91]
    assert inspect.verify(builder.path).ok


def test_partitions_without_a_record_are_counted(tmp_path: Path) -> None:
    with millstream.open(tmp_path / "store") as store:
        store.stream("s", partitions=4).append(b"x")
    report = inspect.verify(tmp_path / "store")
    assert report.ok
    assert (report.streams, report.partitions, report.records) == (1, 4, 1)


def test_several_segments_streams_and_partitions(builder: StoreBuilder) -> None:
    for name in ("a", "b"):
        for number in range(2):
            log = builder.stream(name, partitions=2).log(number)
            for _ in range(3):
                log.append([f"{name}{number}".encode()] * 2, timestamps=3)
                log.roll(size=131072)
            log.append([b"end"])
    builder.write()
    report = inspect.verify(builder.path)
    assert (report.problems, report.notes) == ([], [])
    assert (report.streams, report.partitions, report.segments) == (2, 4, 16)
    assert (report.batches, report.records) == (16, 28)
    assert sum(1 for _ in inspect.records(builder.path, "a", 1)) == 7
    info = inspect.store(builder.path)
    segments = info.streams["b"].partitions[1]
    assert [segment.number for segment in segments] == [1, 2, 3, 4]
    assert [segment.active for segment in segments] == [False, False, False, True]
    assert segments[1].end_position == segments[2].base_position
    assert segments[3].end_position == builder.stream("b").log(1).position
    assert info.clean
    assert not info.alive
    assert info.store_id == builder.store_id


def test_index_entries_are_right_and_a_wrong_one_is_a_note(builder: StoreBuilder, log: Log) -> None:
    log.roll(size=1 << 20)
    for i in range(60):
        log.append([os.urandom(1500)] * 3, timestamps=i)
    builder.write()
    assert inspect.verify(builder.path).notes == []
    flip(log.file(), 8192 + 16 * 3)
    report = inspect.verify(builder.path)
    assert report.ok
    assert [(note.kind, note.position) for note in report.notes] == [("index", 8192 + 48)]


def test_filler_is_passed_over(builder: StoreBuilder, log: Log) -> None:
    log.append([b"a"])
    hole = log.filler(200 // 8 * 8)
    log.append([b"b"])
    log.filler(64, next_chain=log.chain ^ 5)
    log.append([b"c"])
    builder.write()
    assert values_of(builder.path) == [b"a", b"b", b"c"]
    flip(log.file(), hole.at + 64)  # what follows its header is not read
    assert inspect.verify(builder.path).ok


def test_empty_store_and_empty_partition(builder: StoreBuilder) -> None:
    builder.write()
    assert inspect.verify(builder.path) == inspect.Report()
    builder.stream("s", partitions=3).log(1)
    builder.write()
    assert inspect.verify(builder.path).ok
    assert list(inspect.batches(builder.path, "s", 0)) == []


def test_retention_has_taken_the_oldest_segments(builder: StoreBuilder, log: Log) -> None:
    log.append([b"a"])
    log.roll()
    log.append([b"b"])
    log.roll()
    log.append([b"c"])
    builder.write()
    log.file(log.segments[0]).unlink()
    log.control = {"first_segment": 2, "first_offset": 1}
    put(log.stream.path / "control", log.stream.control_bytes())
    assert inspect.verify(builder.path).ok
    assert [(r.offset, r.value) for r in inspect.records(builder.path)] == [(1, b"b"), (2, b"c")]


def test_files_set_aside_are_notes(builder: StoreBuilder, log: Log) -> None:
    log.append([b"a"])
    builder.write()
    for name in ("1.seg.tmp", "2.seg.lost", "3.seg.corrupt", "stray"):
        put(log.path / name, b"?")
    spare = bytearray(log.segment.data)
    spare[40:48] = struct.pack("<Q", 9)
    spare[80:88] = struct.pack("<Q", hash64(bytes(spare[:80])))
    spare[4096:4168] = bytes(72)
    put(log.path / f"{9:016}.seg", bytes(spare))
    report = inspect.verify(builder.path)
    assert report.ok
    assert sorted(notes(report)) == ["corrupt", "foreign", "lost", "spare", "tmp"]


def test_progress_ends_at_all_bytes(builder: StoreBuilder, log: Log) -> None:
    for _ in range(200):
        log.append([b"a"])
    builder.write()
    seen: list[tuple[int, int]] = []
    report = inspect.verify(builder.path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.bytes, report.bytes)
    assert seen == sorted(seen)


def test_dump_says_every_segment_and_batch(builder: StoreBuilder, log: Log) -> None:
    three_batches(log)
    builder.write()
    lines = [str(line) for line in inspect.dump(builder.path)]
    assert [line.split()[0] for line in lines] == ["segment", "batch", "batch", "batch"]
    items = [json.loads(json.dumps(item)) for item in inspect.dump(builder.path, json=True)]
    assert items[3]["base_offset"] == 6
    assert items[3]["chain"] == items[2]["hash"][8:]
    flip(log.file(), log.segment.data_position + 70)
    assert [str(line).split()[0] for line in inspect.dump(builder.path)][1] == "problem"


def test_unknown_names_are_refused(builder: StoreBuilder) -> None:
    builder.stream("s")
    builder.write()
    for name in ("t", "../s", "", ".", "a/b"):
        with pytest.raises(NotFound):
            inspect.verify(builder.path, name)
    with pytest.raises(NotFound):
        list(inspect.batches(builder.path, "s", 1))
    with pytest.raises(NotFound):
        inspect.verify(builder.path / "nothing")


CONTENT = st.one_of(st.none(), st.binary(max_size=12), st.just(b"z" * 700))
ROW = st.tuples(
    CONTENT,
    st.one_of(st.none(), st.binary(max_size=4)),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.lists(
        st.tuples(st.text(max_size=3).filter(str.isprintable), st.binary(max_size=3)), max_size=2
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(ROW, min_size=1, max_size=12), st.booleans()), max_size=6))
def test_round_trip_of_anything(batches: list) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        builder = StoreBuilder(Path(scratch) / "store")
        log = builder.stream("s").log(0)
        expected = []
        for rows, roll in batches:
            values, keys, times, headers = map(list, zip(*rows, strict=True))
            log.append(values, keys=keys, timestamps=times, headers=headers)
            expected += rows
            if roll:
                log.roll()
        builder.write()
        report = inspect.verify(builder.path)
        assert (report.problems, report.notes) == ([], [])
        found = [(r.value, r.key, r.timestamp, r.headers) for r in inspect.records(builder.path)]
        assert found == expected


# Where a log ends ---------------------------------------------------------------------------------


def test_bytes_past_the_tail_of_a_clean_store_mean_nothing(builder: StoreBuilder, log: Log) -> None:
    one, _two, three = three_batches(log)
    log.control = {"tail": three.position, "durable": three.position}
    builder.write()
    flip(log.file(), three.at + 70)
    assert inspect.verify(builder.path).ok
    assert len(values_of(builder.path)) == 2 * one.count


@pytest.mark.parametrize("control", [True, False])
def test_torn_tail_is_a_note(builder: StoreBuilder, log: Log, control: bool) -> None:
    builder.clean = False
    log.stream.control = control
    *_, last = three_batches(log)
    builder.write()
    flip(log.file(), last.end - 1)
    report = inspect.verify(builder.path)
    assert report.ok
    assert {"torn", "unclean"} <= set(notes(report))
    assert [note.position for note in report.notes if note.kind == "torn"] == [last.at]
    assert len(values_of(builder.path)) == 6


def test_lost_page_with_undurable_batches_behind_it_is_a_torn_tail(
    builder: StoreBuilder, log: Log
) -> None:
    builder.clean = False
    _, second, _ = three_batches(log)
    log.roll()
    log.append([b"in the next segment"], synced=second.position)
    builder.write()
    poke(log.file(second.segment), second.at, bytes(second.length))
    report = inspect.verify(builder.path)
    assert report.ok
    assert "torn" in notes(report)
    assert report.records == 3


@pytest.mark.parametrize("where", ["same segment", "next segment"])
def test_later_batch_that_was_written_when_it_was_durable_proves_corruption(
    builder: StoreBuilder, log: Log, where: str
) -> None:
    builder.clean = False
    log.stream.control = False
    _, second, third = three_batches(log)
    if where == "next segment":
        log.roll()
    log.append([b"last"], synced=third.position)
    builder.write()
    flip(log.file(second.segment), second.at + 80)
    report = inspect.verify(builder.path)
    (problem,) = report.problems
    assert (problem.kind, problem.position) == ("batch", second.at)
    assert problem.offset_range == (3, 6)
    assert report.records == 7  # all but the damaged batch
    with pytest.raises(CorruptBatch) as raised:
        list(inspect.batches(builder.path, "s", 0))
    assert raised.value.path == str(log.file(second.segment))
    assert raised.value.position == second.at


def test_failure_below_the_tail_of_a_clean_store_is_corruption(
    builder: StoreBuilder, log: Log
) -> None:
    *_, last = three_batches(log)
    builder.write()
    poke(log.file(), last.at, bytes(64))
    (problem,) = inspect.verify(builder.path).problems
    assert (problem.position, problem.offset_range) == (last.at, (6, 9))


def test_failure_below_the_tail_of_a_living_store_is_corruption(
    builder: StoreBuilder, log: Log
) -> None:
    builder.clean = False
    *_, last = three_batches(log)
    builder.write()
    flip(log.file(), last.at + 70)
    assert inspect.verify(builder.path).ok
    with member(builder, 7):
        assert inspect.store(builder.path).alive
        assert kinds(inspect.verify(builder.path)) == ["batch"]


def test_partition_that_was_not_walked_in_this_generation_may_be_torn(
    builder: StoreBuilder, log: Log
) -> None:
    builder.generation = 2
    log.control = {"walked": 1, "durable": 0}
    *_, last = three_batches(log)
    builder.write()
    flip(log.file(), last.at + 70)
    report = inspect.verify(builder.path)
    assert report.ok
    assert notes(report) == ["torn"]


def test_tail_that_does_not_end_a_batch_is_not_used(builder: StoreBuilder, log: Log) -> None:
    *_, last = three_batches(log)
    for tail in (last.position + 8, log.position + 4096, 1 << 63, 3):
        builder.clean = tail < 1 << 62 and tail != log.position + 4096
        log.control = {"tail": tail, "durable": tail if builder.clean else 0}
        builder.write()
        assert len(values_of(builder.path)) == 9
        assert inspect.verify(builder.path).ok


def test_stale_batch_past_a_cut_is_not_read(builder: StoreBuilder, log: Log) -> None:
    first, _, _ = three_batches(log)
    builder.generation = 2
    log.roll(epoch=2, cut=first)
    log.append([b"new"])
    builder.write()
    assert inspect.verify(builder.path).ok
    found = list(inspect.records(builder.path))
    assert [(r.epoch, r.offset) for r in found] == [(1, 0), (1, 1), (1, 2), (2, 3)]


def test_stale_batch_behind_another_one_of_its_length_does_not_join(
    builder: StoreBuilder, log: Log
) -> None:
    builder.clean = False
    log.stream.control = False
    first, second, _ = three_batches(log)
    (log.chain,) = struct.unpack_from("<I", log.segment.data, first.at)
    log.position, log.offset = second.position, second.base_offset
    log.append([b"Z" * 20, b"x", b"yy"], synced=0)
    builder.write()
    assert [value for value in values_of(builder.path) if value[0] in b"ABCZ"] == [
        b"A" * 20,
        b"Z" * 20,
    ]
    assert "torn" in notes(inspect.verify(builder.path))


# Damage -------------------------------------------------------------------------------------------

REGIONS = {
    "header": "segment",
    "activation": "activation",
    "batches": "batch",
    "store.json": "store",
    "stream.json": "stream",
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("which", ["sealed", "active"])
def test_every_flipped_bit_that_matters_is_found(
    builder: StoreBuilder, log: Log, region: str, which: str
) -> None:
    log.append([b"first", None], keys=[b"k", None], headers=[[("n", b"v")], []], timestamps=[1, 2])
    log.append([b"fixed"] * 3)
    log.roll()
    log.append([b"a" * 30])
    log.append([b"b" * 30, b"c"])
    builder.write()
    segment = log.segments[which == "active"]
    end = log.position if which == "active" else log.segment.base_position
    spans = {
        "header": (log.file(segment), 0, 88),
        "activation": (log.file(segment), 4096, 4168),
        "batches": (log.file(segment), segment.data_position, segment.file_position(end)),
        "store.json": (builder.path / "store.json", 0, len(json_bytes(builder.body))),
        "stream.json": (log.stream.path / "stream.json", 0, len(json_bytes(log.stream.body))),
    }
    path, begin, stop = spans[region]
    for at in range(begin, stop):
        flip(path, at, at % 8)
        assert REGIONS[region] in kinds(inspect.verify(builder.path)), f"byte {at}"
        flip(path, at, at % 8)
    assert inspect.verify(builder.path).ok


def test_flipped_bits_in_caches_lose_no_record(builder: StoreBuilder, log: Log) -> None:
    three_batches(log)
    builder.write()
    expected = values_of(builder.path)
    control = log.stream.path / "control"
    spans = [(control, 0, 72), (control, 4096, 4352), (builder.path / "members", 0, 128)]
    spans += [
        (log.file(), 88, 160),
        (log.file(), 4168, 4240),
        (log.file(), 8192, 8224),
    ]
    spans += [(log.file(), log.segment.file_position(log.position), log.segment.size)]
    for path, begin, stop in spans:
        for at in random.Random(begin).sample(range(begin, stop), min(stop - begin, 300)):
            flip(path, at, at % 8)
            report = inspect.verify(builder.path)
            missing = {"missing"} if path == control and 4096 + 48 <= at < 4096 + 152 else set()
            assert set(kinds(report)) <= missing, f"{path.name}, byte {at}"
            assert missing or values_of(builder.path) == expected
            flip(path, at, at % 8)


@pytest.mark.parametrize(
    "length", [0, 8, 63, 64, 72, 1 << 30, 1 << 31, (1 << 32) - 8, (1 << 32) - 1]
)
@pytest.mark.parametrize("clean", [True, False])
def test_hostile_length_is_refused(
    builder: StoreBuilder, log: Log, length: int, clean: bool
) -> None:
    builder.clean = clean
    _, second, _ = three_batches(log)
    builder.write()
    raw = bytearray(log.segment.data[second.at : second.end])
    raw[8:12] = struct.pack("<I", length)
    poke(log.file(), second.at, seal(bytes(raw), second.segment.salt, second.position))
    report = inspect.verify(builder.path)
    assert ("batch" in kinds(report)) == clean
    assert ("torn" in notes(report)) != clean


@pytest.mark.parametrize("count", [0, 1, 2, 4, 1 << 16, (1 << 31) - 1, (1 << 32) - 1])
def test_hostile_count_with_a_right_hash_is_refused(
    builder: StoreBuilder, log: Log, count: int
) -> None:
    _, second, _ = three_batches(log)
    builder.write()
    raw = bytearray(log.segment.data[second.at : second.end])
    raw[24:28] = struct.pack("<I", count)
    poke(log.file(), second.at, seal(bytes(raw), second.segment.salt, second.position))
    assert "batch" in kinds(inspect.verify(builder.path))


@pytest.mark.parametrize(
    "offsets", [(0, 5, 3, 23), (1, 20, 21, 23), (0, -1, 0, 23), (0, 20, 21, -8)]
)
def test_value_offsets_that_fall_are_refused(
    builder: StoreBuilder, log: Log, offsets: tuple[int, ...]
) -> None:
    _, second, _ = three_batches(log)
    builder.write()
    raw = bytearray(log.segment.data[second.at : second.end])
    raw[64:80] = struct.pack("<4i", *offsets)
    poke(log.file(), second.at, seal(bytes(raw), second.segment.salt, second.position))
    assert "batch" in kinds(inspect.verify(builder.path))


def test_limits_hold_on_read(builder: StoreBuilder, log: Log) -> None:
    cases = [
        {"keys": [b"k" * 65537]},
        {"headers": [[("n" * 256, b"")]]},
        {"headers": [[("n", b"v" * ((1 << 20) + 1))]]},
        {"headers": [[("n", b"")] * 1025]},
    ]
    for case in cases:
        log.segments.clear()
        log.position = log.offset = log.hash = log.chain = 0
        log.roll(size=2 << 20)
        log.append([b"v"], **case)
        builder.write()
        assert kinds(inspect.verify(builder.path)) == ["batch"]
    log.segments.clear()
    log.position = log.offset = log.hash = log.chain = 0
    log.roll(size=2 << 20)
    log.append([b"v"], keys=[b"k" * 65536], headers=[[("n" * 255, b"v")] * 1024])
    builder.write()
    assert inspect.verify(builder.path).ok


def test_moved_batch_does_not_pass(builder: StoreBuilder, log: Log) -> None:
    first, second, _ = three_batches(log)
    builder.write()
    poke(log.file(), second.at, bytes(log.segment.data[first.at : first.end]))
    (problem,) = inspect.verify(builder.path).problems
    assert (problem.position, problem.expected.split()[0]) == (second.at, "hash")


def test_batch_of_another_segment_does_not_pass(builder: StoreBuilder, log: Log) -> None:
    three_batches(log)
    log.roll()
    first = log.append([b"D" * 20, b"x", b"yy"])
    builder.write()
    other = log.segments[0]
    poke(log.file(), first.at, bytes(other.data[other.data_position :][: first.length]))
    assert kinds(inspect.verify(builder.path)) == ["batch"]


@pytest.mark.parametrize("change", [{"flags_or": 1 << 9}, {"format": 2}])
def test_newer_batch_is_named_not_taken_for_torn(
    builder: StoreBuilder, log: Log, change: dict
) -> None:
    builder.clean = False
    log.append([b"a"])
    newer = log.append([b"b"], **change)
    builder.write()
    (problem,) = inspect.verify(builder.path).problems
    assert (problem.kind, problem.position) == ("version", newer.at)
    with pytest.raises(VersionMismatch, match="version"):
        values_of(builder.path)
    before = log.file().read_bytes()
    assert [action.kind for action in repair(builder.path)] == ["cannot"]
    assert log.file().read_bytes() == before


@pytest.mark.parametrize("name", ["store.json", "streams/s/stream.json"])
def test_newer_json_is_a_version_mismatch(builder: StoreBuilder, name: str) -> None:
    stream = builder.stream("s")
    builder.write()
    body = builder.body if name == "store.json" else stream.body
    put(builder.path / name, json_bytes({**body, "format": 2}))
    assert kinds(inspect.verify(builder.path)) == ["version"]
    with pytest.raises(VersionMismatch):
        inspect.store(builder.path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"body": 1e999, "checksum": ""}',
        b"\xff\xfe",
        b'{"body": ' + b"9" * 10_000 + b', "checksum": ""}',
        b" " * (2 << 20),
        json_bytes({"format": 1}),
        json_bytes({"format": True}),
        json_bytes([1]),
        json_bytes(
            {"format": 1, "store_id": "x" * 32, "generation": 1, "clean": 1, "durability": 0}
        ),
        json_bytes(
            {
                "format": 1,
                "store_id": "x" * 32,
                "generation": 1,
                "clean": True,
                "durability": "sync",
                "stream_id": "x" * 16,
                "partitions": 1,
                "segment_bytes": 65536,
            }
        ),
    ],
)
def test_damaged_json_is_a_problem(builder: StoreBuilder, raw: bytes) -> None:
    builder.stream("s")
    builder.write()
    put(builder.path / "store.json", raw)
    assert kinds(inspect.verify(builder.path)) == ["store"]
    with pytest.raises(CorruptBatch):
        inspect.store(builder.path)
    builder.write()
    put(builder.path / "streams" / "s" / "stream.json", raw)
    assert kinds(inspect.verify(builder.path)) == ["stream"]


@pytest.mark.parametrize(
    ("at", "raw"),
    [
        (12, struct.pack("<I", 5)),
        (40, struct.pack("<Q", 7)),
        (56, struct.pack("<Q", 1 << 40)),
        (64, struct.pack("<I", (1 << 32) - 1)),
        (68, struct.pack("<I", 12289)),
        (68, struct.pack("<I", (1 << 32) - 4096)),
        (8, struct.pack("<I", 2)),
    ],
)
def test_hostile_segment_header_with_a_right_checksum(
    builder: StoreBuilder, log: Log, at: int, raw: bytes
) -> None:
    three_batches(log)
    log.poke(log.segment, at, raw)
    log.poke(log.segment, 80, struct.pack("<Q", hash64(bytes(log.segment.data[:80]))))
    builder.write()
    expected = "version" if at == 8 else "segment"
    assert expected in kinds(inspect.verify(builder.path))


def test_hostile_activation_with_a_right_checksum(builder: StoreBuilder, log: Log) -> None:
    three_batches(log)
    log.roll()
    log.append([b"x"])
    for position in (1 << 63, (1 << 64) - 8, 0, 8):
        log.segment.base_position = position
        log.write_activation(log.segment)
        builder.write()
        assert not inspect.verify(builder.path).ok


def test_missing_segment_is_found_with_its_offsets(builder: StoreBuilder, log: Log) -> None:
    for _ in range(3):
        three_batches(log)
        log.roll()
    log.append([b"x"])
    builder.write()
    log.file(log.segments[1]).unlink()
    (problem,) = inspect.verify(builder.path).problems
    assert (problem.kind, problem.offset_range) == ("missing", (9, 18))
    assert inspect.verify(builder.path).records == 19
    builder.write()
    log.file().unlink()
    assert "missing" in kinds(inspect.verify(builder.path))


def test_segment_shorter_than_it_says_and_files_that_are_none(
    builder: StoreBuilder, log: Log
) -> None:
    three_batches(log)
    builder.write()
    os.truncate(log.file(), log.segment.data_position + 100)
    assert "segment" in kinds(inspect.verify(builder.path))
    log.file().unlink()
    os.mkfifo(log.file())
    assert "unreadable" in kinds(inspect.verify(builder.path))
    log.file().unlink()
    log.file().symlink_to("/dev/zero")
    assert "unreadable" in kinds(inspect.verify(builder.path))


@pytest.mark.parametrize("size", [0, 50, 87])
def test_segment_and_members_that_end_within_their_header(
    builder: StoreBuilder, log: Log, size: int
) -> None:
    three_batches(log)
    builder.write()
    os.truncate(builder.path / "members", min(size, 63))
    report = inspect.verify(builder.path)
    assert report.ok
    assert notes(report) == ["members"]
    assert [action.kind for action in repair(builder.path)] == ["cannot"]
    builder.write()
    os.truncate(log.file(), size)
    assert "segment" in kinds(inspect.verify(builder.path))
    assert {action.kind for action in repair(builder.path)} == {"cannot"}
    assert log.file().stat().st_size == size


@pytest.mark.parametrize("name", ["stream.json", "00000"])
def test_what_cannot_be_read_is_named_and_the_rest_is_read(
    builder: StoreBuilder, log: Log, name: str
) -> None:
    three_batches(log)
    three_batches(builder.stream("whole").log(0))
    builder.write()
    if name == "00000":
        log.file().unlink()
        log.path.rmdir()
        log.path.symlink_to(log.path)  # a directory whose path has no end
    else:
        (log.stream.path / name).unlink()
        os.mkfifo(log.stream.path / name)
    report = inspect.verify(builder.path)
    assert kinds(report) == ["unreadable"]
    assert report.problems[0].path == log.stream.path / name
    assert report.records == 9
    if name == "stream.json":
        (action,) = repair(builder.path)
        assert (action.kind, action.path) == ("cannot", log.stream.path / name)


def test_group_and_page_of_the_journal_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with millstream.open(path) as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
        with store.stream("s").consumer("g"):
            pass
    page = path / "streams" / "@journal" / "page"
    os.truncate(page, 100)  # what it says is only what need not be done again
    report = inspect.verify(path)
    assert report.ok
    assert [(note.kind, note.path) for note in report.notes] == [("journal", page)]
    (group,) = (path / "streams" / "s" / "groups").iterdir()
    for file in (page, group):
        file.unlink()
        os.mkfifo(file)
    report = inspect.verify(path)
    assert sorted((one.kind, one.path) for one in report.problems) == [
        ("unreadable", page),
        ("unreadable", group),
    ]
    assert report.records == 3


def test_ids_and_sequences_of_producers_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with millstream.open(path) as store:
        store.stream("s").producer("p").append_many([b"x"], first_sequence=0)
    files = [path / "streams" / "s" / "producers", path / "streams" / "s" / "00000" / "sequences"]
    for file in files:
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    report = inspect.verify(path)
    assert {one.path for one in report.problems if one.kind == "unreadable"} == set(files)
    assert report.records == 1
    said = [str(item) for item in inspect.dump(path, json=True)]
    for file in files:
        assert any("problem" in one and str(file) in one for one in said)


def test_disk_that_refuses_to_read_is_a_finding(
    builder: StoreBuilder, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_batches(log)
    three_batches(builder.stream("whole").log(0))
    builder.write()
    real = os.pread

    def pread(fd: int, size: int, at: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(log.file()):
            raise OSError(5, "Input/output error")
        return real(fd, size, at)

    monkeypatch.setattr(os, "pread", pread)
    report = inspect.verify(builder.path)
    assert [(one.kind, one.path) for one in report.problems][:1] == [("unreadable", log.file())]
    assert "Input/output error" in str(report.problems[0])
    assert report.records == 9


@pytest.mark.parametrize("number", [0, 1])
def test_segment_that_goes_while_the_log_is_walked(
    builder: StoreBuilder, log: Log, number: int
) -> None:
    """Retention takes the oldest one; of any other the records are lost."""
    for _ in range(2):
        three_batches(log)
        log.roll()
    log.append([b"end"])
    builder.write()
    (walked,) = reading.logs(builder.path)
    log.file(log.segments[number]).unlink()
    events = list(checking.checked(walked))
    said = [one.kind for one in events if isinstance(one, inspect.Note | inspect.Problem)]
    assert said == (["unreadable"] if number else ["retired"])
    assert sum(one.count for one in events if isinstance(one, inspect.Batch)) == 10


def test_segment_that_is_retired_once_it_was_listed(
    builder: StoreBuilder, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_batches(log)
    log.roll()
    log.append([b"end"])
    log.control = {"first_segment": 2, "first_offset": 9}
    builder.write()
    real = walk.listing

    def listing(path: Path) -> list[Path]:
        found = real(path)
        log.file(log.segments[0]).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(walk, "listing", listing)
    report = inspect.verify(builder.path)
    assert (report.problems, report.records) == ([], 1)


def test_store_that_is_read_names_the_segment_that_is_damaged_or_gone(
    builder: StoreBuilder, log: Log
) -> None:
    for _ in range(2):
        three_batches(log)
        log.roll()
    log.append([b"end"])
    builder.write()
    path = log.file(log.segments[1])
    flip(path, 4096 + 24)
    with pytest.raises(CorruptBatch) as raised:
        inspect.store(builder.path)
    assert (raised.value.path, raised.value.position) == (str(path), 4096)
    builder.write()
    log.file().unlink()
    with pytest.raises(CorruptBatch) as raised:
        inspect.store(builder.path)
    assert raised.value.path == str(log.file())


@pytest.mark.parametrize("change", [{"base_offset": 2}, {"flags_or": KEY_NULLS}])
def test_batch_that_contradicts_what_it_follows_or_itself(
    builder: StoreBuilder, log: Log, change: dict
) -> None:
    first, *_ = three_batches(log)
    wrong = log.append([b"x"], **change)
    builder.write()
    report = inspect.verify(builder.path)
    assert [(one.kind, one.position) for one in report.problems] == [("batch", wrong.at)]
    assert report.records == 3 * first.count


def test_contents_against_flags_are_problems(builder: StoreBuilder, log: Log) -> None:
    log.append([b"a", b"bb"], flags_or=FIXED)
    log.append([b"a", b"b"], offsets=[9, 4], base_offset=9)
    log.offset = 20
    placed = log.append([b"c"], timestamps=3)
    raw = bytearray(log.segment.data[placed.at : placed.end])
    raw[32:40] = struct.pack("<q", 2)
    log.poke(log.segment, placed.at, seal(bytes(raw), log.segment.salt, placed.position))
    builder.write()
    assert kinds(inspect.verify(builder.path)) == ["content"] * 3


@pytest.mark.parametrize("name", [b"na\xffe", b"nam\xc3"])
def test_names_of_headers_that_are_no_text_are_a_problem(
    builder: StoreBuilder, log: Log, name: bytes
) -> None:
    placed = log.append([b"a"], headers=[[("name", b"v")]])
    raw = bytes(log.segment.data[placed.at : placed.end]).replace(b"name", name)
    log.poke(log.segment, placed.at, seal(raw, log.segment.salt, placed.position))
    builder.write()
    (problem,) = inspect.verify(builder.path).problems
    assert (problem.kind, problem.position) == ("content", placed.at)
    assert "UTF-8" in str(problem)


def test_nested_plausible_headers_do_not_hold_up_the_search(
    builder: StoreBuilder, log: Log
) -> None:
    size = 1 << 20
    log.roll(size=size + 65536)
    first = log.append([b"x" * size])
    log.append([b"end"])
    builder.write()
    at = first.at + 128
    raw = bytearray()
    while len(raw) < size - 256:
        length = (first.end - at - len(raw)) // 8 * 8
        body = struct.pack("<ii", 0, length - 72)
        raw += HEADER.pack(1, length, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0) + body
    poke(log.file(), at, bytes(raw))
    assert kinds(inspect.verify(builder.path)) == ["batch"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_ends_in_anything_but_a_finding(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        builder = StoreBuilder(Path(scratch) / "store", clean=data.draw(st.booleans()))
        log = builder.stream("s").log(0)
        three_batches(log)
        log.roll()
        log.append([b"a"], keys=[b"k"], headers=[[("n", b"v")]])
        builder.write()
        paths = [path for path in sorted(builder.path.rglob("*")) if path.is_file()]
        for _ in range(data.draw(st.integers(1, 4))):
            path = data.draw(st.sampled_from(paths))
            edges = [at for at in (0, 64, 4096, 8192, 12288) if at < path.stat().st_size]
            at = data.draw(st.sampled_from(edges)) + data.draw(st.integers(0, 400))
            poke(path, at, data.draw(st.binary(min_size=1, max_size=16)))
        inspect.verify(builder.path)
        repair(builder.path)
        for read in (inspect.records, inspect.dump):
            with suppress(StorageError, VersionMismatch):
                list(read(builder.path))


# Repair -------------------------------------------------------------------------------------------


def member(builder: StoreBuilder, index: int, *, byte: int | None = None, pid: int = 4242):
    """Hold the lock of a member's entry, as a process that has the store open does."""
    fd = os.open(builder.path / "members", os.O_RDWR)
    at = 64 + 64 * index if byte is None else byte
    if byte is None:
        os.pwrite(fd, struct.pack("<II", 1, pid), at)
    kind = fcntl.F_RDLCK if byte == 1 else fcntl.F_WRLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))
    return os.fdopen(fd, "rb")


def check_mended(builder: StoreBuilder, path: Path, before: bytes) -> inspect.Report:
    """Assert what holds of a file once it was put in the place of a damaged one."""
    report = inspect.verify(builder.path)
    assert report.problems == []
    aside = path.with_name(path.name + ".corrupt")
    assert aside.read_bytes() == before
    assert path.stat().st_size == len(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert repair(builder.path) == []
    return report


def check_repaired(builder: StoreBuilder, path: Path, before: bytes) -> inspect.Report:
    """Assert what every repair promises."""
    report = check_mended(builder, path, before)
    assert not inspect.store(builder.path).clean
    assert not list(builder.path.rglob("*.tmp"))
    return report


@pytest.mark.parametrize("damaged", [[0], [1], [1, 2], [0, 2], [3]])
def test_repair_passes_over_damaged_batches(
    builder: StoreBuilder, log: Log, damaged: list[int]
) -> None:
    placed = [*three_batches(log), log.append([b"last of the segment"])]
    log.roll()
    log.append([b"end"])
    builder.write()
    path = log.file(log.segments[0])
    for index in damaged:
        flip(path, placed[index].at + 68)
    before = path.read_bytes()
    planned = repair(builder.path, dry_run=True)
    assert path.read_bytes() == before
    assert inspect.store(builder.path).clean
    assert repair(builder.path) == planned
    assert {action.kind for action in planned} == {"filler", "unclean"}
    report = check_repaired(builder, path, before)
    lost = sum(placed[index].count for index in damaged)
    assert report.records == 11 - lost
    kept = [value for i, batch in enumerate(placed) if i not in damaged for value in batch.values]
    assert values_of(builder.path) == [*kept, b"end"]
    assert [record.offset for record in inspect.records(builder.path)][-1] == 10


def test_repair_of_a_repaired_file_keeps_both_originals(builder: StoreBuilder, log: Log) -> None:
    placed = three_batches(log)
    log.append([b"end"])
    builder.write()
    flip(log.file(), placed[0].at + 68)
    first = log.file().read_bytes()
    repair(builder.path)
    second_damage = placed[2].at + 68
    store = json.loads((builder.path / "store.json").read_text())["body"]
    put(builder.path / "store.json", json_bytes({**store, "clean": True}))
    flip(log.file(), second_damage)
    second = log.file().read_bytes()
    repair(builder.path)
    assert inspect.verify(builder.path).ok
    assert log.file().with_name(log.file().name + ".corrupt").read_bytes() == first
    assert log.file().with_name(log.file().name + ".2.corrupt").read_bytes() == second
    assert values_of(builder.path) == [*placed[1].values, b"end"]


def test_repair_passes_over_damage_that_ends_at_the_tail(builder: StoreBuilder, log: Log) -> None:
    *kept, last = three_batches(log)
    builder.write()
    flip(log.file(), last.at + 70)
    before = log.file().read_bytes()
    assert {action.kind for action in repair(builder.path)} == {"filler", "unclean"}
    check_repaired(builder, log.file(), before)
    assert values_of(builder.path) == [value for batch in kept for value in batch.values]


def test_repair_cannot_help_where_the_end_is_not_known(builder: StoreBuilder, log: Log) -> None:
    *_, last = three_batches(log)
    log.control = {"hint_tail": 0}
    builder.write()
    flip(log.file(), last.at + 70)
    before = log.file().read_bytes()
    (action,) = repair(builder.path)
    assert action.kind == "cannot"
    assert log.file().read_bytes() == before
    assert inspect.store(builder.path).clean


def test_repair_cannot_help_behind_damage_where_the_next_segment_is_damaged(
    builder: StoreBuilder, log: Log
) -> None:
    *_, last = three_batches(log)
    log.roll()
    log.append([b"end"])
    log.segment.base_offset = 1  # the segment before has come further
    log.write_activation(log.segment)
    builder.write()
    flip(log.file(log.segments[0]), last.at + 70)
    before = [log.file(segment).read_bytes() for segment in log.segments]
    actions = repair(builder.path)
    assert [(action.kind, action.path) for action in actions] == [
        ("cannot", log.file(segment)) for segment in log.segments
    ]
    assert [log.file(segment).read_bytes() for segment in log.segments] == before


def test_repair_cannot_help_where_no_header_has_room(builder: StoreBuilder, log: Log) -> None:
    three_batches(log)
    log.position += 40  # rubbish of less than a header's 64 bytes, at the end of a segment
    log.roll()
    log.append([b"end"])
    builder.write()
    before = log.file(log.segments[0]).read_bytes()
    assert [action.kind for action in repair(builder.path)] == ["cannot"]
    assert log.file(log.segments[0]).read_bytes() == before


def test_repair_covers_what_is_longer_than_a_batch_may_be(
    builder: StoreBuilder, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each header covers at most that much, and what is left for the last one has room for it."""
    first = log.append([b"a" * 1000])
    log.append([b"b"])
    builder.write()
    flip(log.file(), first.at + 70)
    before = log.file().read_bytes()
    monkeypatch.setattr(mending, "BATCH_BYTES_MAX", first.length - 8)
    actions = repair(builder.path)
    assert [action.kind for action in actions] == ["filler", "filler", "unclean"]
    check_repaired(builder, log.file(), before)
    assert values_of(builder.path) == [b"b"]


def test_repair_leaves_a_torn_tail_to_recovery(builder: StoreBuilder, log: Log) -> None:
    builder.clean = False
    log.stream.control = False
    *_, last = three_batches(log)
    builder.write()
    flip(log.file(), last.at + 70)
    assert repair(builder.path) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_repair_rebuilds_an_activation_record(builder: StoreBuilder, log: Log, number: int) -> None:
    for _ in range(2):
        log.append([b"a" * 30], timestamps=5)
        log.append([b"b"])
        log.roll()
    log.append([b"c"])
    builder.write()
    expected = list(inspect.records(builder.path))
    original = inspect.store(builder.path).streams["s"].partitions[0][number]
    path = log.file(log.segments[number])
    flip(path, 4096 + 24)
    before = path.read_bytes()
    planned = repair(builder.path, dry_run=True)
    assert {action.kind for action in planned} == {"activation", "unclean"}
    assert repair(builder.path) == planned
    check_repaired(builder, path, before)
    assert list(inspect.records(builder.path)) == expected
    rebuilt = inspect.store(builder.path).streams["s"].partitions[0][number]
    for name in ("base_offset", "base_position", "epoch", "predecessor", "predecessor_hash"):
        assert getattr(rebuilt, name) == getattr(original, name)
    assert rebuilt.timestamp_max == (5 if number else NONE)


def test_repair_does_not_guess_an_epoch(builder: StoreBuilder, log: Log) -> None:
    builder.generation = 3
    log.roll(epoch=1)
    log.append([b"a"])
    log.roll(epoch=2)
    log.append([b"b"])
    builder.write()
    flip(log.file(), 4096 + 24)
    before = log.file().read_bytes()
    assert {action.kind for action in repair(builder.path)} == {"cannot"}
    assert log.file().read_bytes() == before


@pytest.mark.parametrize("why", ["damage before", "none before", "damage behind"])
def test_repair_does_not_guess_where_a_segment_begins(
    builder: StoreBuilder, log: Log, why: str
) -> None:
    three_batches(log)
    log.roll()
    first, *_ = three_batches(log)
    log.roll()
    log.append([b"end"])
    builder.write()
    damaged = log.file(log.segments[1])
    flip(damaged, 4096 + 24)
    if why == "damage before":
        flip(log.file(log.segments[0]), log.segments[0].data_position + 70)
    elif why == "none before":
        log.file(log.segments[0]).unlink()
    else:
        flip(damaged, first.at + 70)
    before = damaged.read_bytes()
    assert "activation" not in {action.kind for action in repair(builder.path)}
    assert damaged.read_bytes() == before
    assert not inspect.verify(builder.path).ok


def test_repair_cannot_rebuild_json_or_headers(builder: StoreBuilder, log: Log) -> None:
    three_batches(log)
    builder.write()
    for path, at in (
        (log.file(), 20),
        (log.stream.path / "stream.json", 20),
        (builder.path / "store.json", 20),
        (builder.path / "members", 20),
    ):
        flip(path, at)
        assert {action.kind for action in repair(builder.path)} == {"cannot"}
        flip(path, at)
    assert repair(builder.path) == []


def test_repair_refuses_a_store_that_is_open(builder: StoreBuilder, log: Log) -> None:
    _, second, _ = three_batches(log)
    builder.write()
    flip(log.file(), second.at + 70)
    with member(builder, 1023, pid=31337), pytest.raises(StorageError, match="31337"):
        repair(builder.path)
    with member(builder, 0, byte=1), pytest.raises(StorageError, match="reading"):
        repair(builder.path)
    with member(builder, 0, byte=0), pytest.raises(StorageError, match="opening"):
        repair(builder.path, dry_run=True)
    assert not log.file().with_name(log.file().name + ".corrupt").exists()
    assert {action.kind for action in repair(builder.path)} == {"filler", "unclean"}


def test_repair_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        repair(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        repair(tmp_path / "file")
    (tmp_path / "members").symlink_to(tmp_path / "file")  # not followed
    with pytest.raises(StorageError, match="members"):
        repair(tmp_path)


@pytest.mark.parametrize("failing_file", [".seg.repair.tmp", "store.json.repair.tmp"])
def test_failed_repair_leaves_the_original(
    builder: StoreBuilder, log: Log, monkeypatch: pytest.MonkeyPatch, failing_file: str
) -> None:
    _, second, _ = three_batches(log)
    builder.write()
    flip(log.file(), second.at + 70)
    before = log.file().read_bytes()
    real = os.fsync

    def failing(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(failing_file):
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError):
        repair(builder.path)
    monkeypatch.undo()
    if failing_file.startswith("store"):  # the last step; what was mended before it holds
        check_mended(builder, log.file(), before)
        with millstream.open(builder.path) as store:
            store.stream("s").append(b"goes on")
        assert values_of(builder.path)[-1] == b"goes on"
        return
    assert log.file().read_bytes() == before
    assert not list(builder.path.rglob("*.tmp"))
    assert {action.kind for action in repair(builder.path)} == {"filler", "unclean"}


def test_file_that_shrinks_while_it_is_copied_is_not_replaced(
    builder: StoreBuilder, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second, _ = three_batches(log)
    builder.write()
    flip(log.file(), second.at + 70)
    real = os.ftruncate

    def shrinking(fd: int, size: int) -> None:
        real(fd, size)
        os.truncate(log.file(), 20_000)

    monkeypatch.setattr(os, "ftruncate", shrinking)
    with pytest.raises(StorageError, match="shrank"):
        repair(builder.path)
    assert [path.name for path in log.path.iterdir()] == [log.file().name]
    assert log.file().stat().st_size == 20_000


@pytest.mark.parametrize("other", ["newer", "unreadable"])
def test_repair_of_one_stream_leaves_a_store_clean_where_another_cannot_be_read(
    builder: StoreBuilder, other: str
) -> None:
    one, two = builder.stream("a").log(0), builder.stream("b")
    _, second, _ = three_batches(one)
    builder.write()
    flip(one.file(), second.at + 70)
    path = two.path / "stream.json"
    path.unlink()
    if other == "newer":
        put(path, json_bytes({**two.body, "format": 2}))
    else:
        os.mkfifo(path)
    assert [action.kind for action in repair(builder.path, "a")] == ["filler"]
    assert json.loads((builder.path / "store.json").read_text())["body"]["clean"]
    assert inspect.verify(builder.path, "a").ok


@pytest.mark.parametrize("stream", [None, "a"])
def test_repair_leaves_a_store_clean_while_that_tells_damage_from_a_torn_tail(
    builder: StoreBuilder, stream: str | None
) -> None:
    one, other = builder.stream("a").log(0), builder.stream("b").log(0)
    _, second, _ = three_batches(one)
    *_, last = three_batches(other)
    other.control = {"hint_tail": 0}
    builder.write()
    flip(one.file(), second.at + 70)
    flip(other.file(), last.at + 70)
    found = {action.kind for action in repair(builder.path, stream)}
    assert found == ({"filler"} if stream else {"filler", "cannot"})
    assert inspect.store(builder.path).clean
    assert inspect.verify(builder.path, "a").ok
    assert kinds(inspect.verify(builder.path)) == ["batch"]


def test_filler_bytes_are_those_of_the_format(builder: StoreBuilder, log: Log) -> None:
    first, second, third = three_batches(log)
    builder.write()
    flip(log.file(), second.at + 70)
    repair(builder.path)
    raw = log.file().read_bytes()[second.at : second.at + 64]
    assert raw == seal(raw, log.segment.salt, second.position, filler=True)
    _, length, format, flags, base, count, chain, *_, sequence = HEADER.unpack(raw)
    (first_hash,) = struct.unpack_from("<Q", log.segment.data, first.at)
    (third_chain,) = struct.unpack_from("<I", log.segment.data, third.at + 28)
    assert (length, format, flags, base, count) == (second.length, 1, FILLER, 3, 0)
    assert (chain, sequence) == (first_hash & 0xFFFFFFFF, third_chain)
