"""Handles of streams: where records are, what is configured, what is durable."""

import copy
import json
import pickle
import threading

import pytest
import xxhash
from timing import until

import millstream
from millstream import (
    Closed,
    ConfigMismatch,
    InvalidArgument,
    InvalidType,
    NotFound,
    OffsetOutOfRange,
    Position,
    Retention,
    Span,
)


def values(stream, **options):
    return [value for batch in stream.read(**options) for value in batch.values]


# --- positions and spans --------------------------------------------------------------------------


def test_position_behaves_as_its_tuple():
    position = Position(3, 1, 42)
    partition, epoch, offset = position
    assert (partition, epoch, offset) == (3, 1, 42) == tuple(position) == position
    assert (position.partition, position.epoch, position.offset) == (3, 1, 42)
    assert position[2] == position[-1] == 42
    assert position[:2] == (3, 1)
    assert len(position) == 3
    assert hash(position) == hash((3, 1, 42))
    assert repr(position) == "Position(partition=3, epoch=1, offset=42)"
    assert Position(0, 2, 0) < Position(1, 1, 0) <= Position(1, 1, 0) < (1, 1, 1)
    assert Position(1, 1, 1) > Position(1, 1, 0) >= Position(1, 1, 0)
    assert position != Position(3, 1, 43)
    assert position != "x"
    assert {position: 1}[(3, 1, 42)] == 1
    with pytest.raises(IndexError):
        position[3]
    with pytest.raises(TypeError):
        _ = position < 3
    with pytest.raises(AttributeError):
        position.offset = 1


def test_span_behaves_as_its_tuple():
    span = Span(3, 1, 42, 5)
    partition, epoch, first_offset, count = span
    assert (partition, epoch, first_offset, count) == (3, 1, 42, 5) == span
    assert (span.partition, span.epoch, span.first_offset, span.count) == (3, 1, 42, 5)
    assert len(span) == 4
    assert span[3] == 5
    assert hash(span) == hash((3, 1, 42, 5))
    assert repr(span) == "Span(partition=3, epoch=1, first_offset=42, count=5)"
    assert span != Span(3, 1, 42, 6)


@pytest.mark.parametrize("value", [Position(1, 2, 1 << 60), Span(1, 2, 3, 4)])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_position_and_span_pickle(value, protocol):
    again = pickle.loads(pickle.dumps(value, protocol))
    assert again == value
    assert type(again) is type(value)
    assert copy.deepcopy(value) == value


def test_spans_cover_what_was_appended(store):
    stream = store.stream("p", partitions=3)
    keys = [b"%d" % (i % 17) for i in range(200)]
    spans = stream.append_many([b"%d" % i for i in range(200)], keys=keys)
    assert sum(span.count for span in spans) == 200
    assert sorted(span.partition for span in spans) == [0, 1, 2]
    again = stream.append_many([b"x"] * 200, keys=keys)
    for span, following in zip(spans, again, strict=True):
        assert following.first_offset == span.first_offset + span.count
        [batch] = stream.read(partition=span.partition, start=span.first_offset,
                              max_records=span.count)  # fmt: skip
        assert len(batch) == span.count
        assert batch.epoch == span.epoch


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", [1, 2, 7, 64, 4096])
def test_partition_of_a_key_is_its_xxh3_for_ever(store, partitions):
    stream = store.stream("p", partitions=partitions)
    for key in (b"", b"N14228", bytes(300), bytearray(b"N14228"), memoryview(b"xyz")[1:]):
        assert stream.partition_for(key) == xxhash.xxh3_64_intdigest(key) % partitions


# --- configuration --------------------------------------------------------------------------------


def test_what_is_not_given_is_as_stored(tmp_path):
    keep = Retention(bytes="10GiB", age="30d", records=10**9)
    with millstream.open(tmp_path / "s") as store:
        store.stream("s", partitions=3, retention=keep, segment_bytes="1MiB", durability="sync")
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        assert (stream.partitions, stream.retention, stream.segment_bytes, stream.durability) == (
            3,
            keep,
            1 << 20,
            "sync",
        )
        stats = stream.stats()
        assert (stats.name, stats.retention, stats.durability) == ("s", keep, "sync")
        assert store.stream("s", partitions=3, retention=keep, segment_bytes=1 << 20) is stream
        for wrong in (
            {"partitions": 4},
            {"partitions": 2},
            {"segment_bytes": 1 << 21},
            {"retention": Retention()},
            {"retention": Retention(age=1)},
        ):
            with pytest.raises(ConfigMismatch, match="'s' has") as caught:
                store.stream("s", **wrong)
            assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"partitions": 0}, InvalidArgument),
        ({"partitions": -1}, InvalidArgument),
        ({"partitions": 4097}, InvalidArgument),
        ({"partitions": "8"}, InvalidType),
        ({"partitions": 1.5}, InvalidType),
        ({"partitions": True}, InvalidType),
        ({"segment_bytes": 100}, InvalidArgument),
        ({"segment_bytes": 1 << 40}, InvalidArgument),
        ({"segment_bytes": "big"}, InvalidArgument),
        ({"segment_bytes": 1e6}, InvalidType),
        ({"retention": 5}, InvalidType),
        ({"retention": {"bytes": 5}}, InvalidType),
        ({"durability": "none"}, InvalidArgument),
    ],
)
def test_settings_that_make_no_sense_create_nothing(store, wrong, error):
    with pytest.raises(error):
        store.stream("s", **wrong)
    assert store.streams() == []


def test_handle_is_the_same_until_it_has_a_level_of_its_own(store):
    """A handle with another level replaced the one that later calls, and close(), knew of."""
    plain = store.stream("s")
    assert store.stream("s") is plain
    strict = store.stream("s", durability="sync")
    assert strict is not plain
    assert strict is store.stream("s", durability="sync")
    assert (strict.durability, plain.durability) == ("sync", "process")
    assert store.stream("s") is plain
    position = strict.append(b"a")
    assert plain.durable_offset(0) > position.offset
    assert plain.append(b"b").offset == 1
    assert values(strict) == values(plain) == [b"a", b"b"]


def test_close_and_drop_reach_every_handle(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        handles = [store.stream("s", durability=level) for level in (None, "process", "sync")]
        dropped = [store.stream("d", durability=level) for level in (None, "process")]
        for handle in handles + dropped:
            handle.append(b"x")
        store.drop_stream("d")
        for handle in dropped:
            with pytest.raises(Closed):
                handle.append(b"y")
    for handle in handles:
        assert handle.closed
        with pytest.raises(Closed):
            handle.append(b"y")


def test_first_level_that_is_given_holds(tmp_path):
    path = tmp_path / "s"
    with millstream.open(path, durability="interval") as store:
        assert store.stream("plain").durability == "interval"
        assert store.stream("strict", durability="sync").durability == "sync"
        assert store.stream("strict").durability == "sync"
    with millstream.open(path, durability="process") as store:
        assert store.stream("plain").durability == "process"
        assert store.stream("strict").durability == "sync", "stored with the stream"
        assert store.stream("plain", durability="sync").durability == "sync"
        assert store.durability == "interval", "what is stored"
    with millstream.open(path) as store:
        assert store.stream("plain").durability == "interval"


def test_alter_is_stored_and_seen_by_every_handle(tmp_path):
    with millstream.open(tmp_path / "s") as store, millstream.open(tmp_path / "s") as other:
        stream, theirs = store.stream("s", partitions=2), other.stream("s")
        mine = store.stream("s", durability="process")
        stream.alter(retention=Retention(age="1h"), segment_bytes="64KiB", durability="sync")
        for handle in (stream, theirs, mine):
            stats = handle.stats()
            assert stats.retention == handle.retention == Retention(age=3600)
            assert stats.segment_bytes == handle.segment_bytes == 65536
        assert (stream.durability, theirs.durability, mine.durability) == (
            "sync",
            "sync",
            "process",
        )
        theirs.alter(retention=None, durability=None)
        assert stream.stats().retention == Retention()
        assert stream.durability == "interval"
        assert stream.segment_bytes == 65536
    with millstream.open(tmp_path / "s") as store:
        assert store.stream("s").stats().retention == Retention()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"retention": "30d"}, InvalidType),
        ({"segment_bytes": 5}, InvalidArgument),
        ({"segment_bytes": None}, InvalidType),
        ({"durability": "fast"}, InvalidArgument),
    ],
)
def test_alter_of_what_makes_no_sense_changes_nothing(stream, wrong, error):
    before = stream.stats()
    with pytest.raises(error):
        stream.alter(**wrong)
    assert stream.stats() == before


def test_writer_follows_an_altered_level(tmp_path):
    """A process that only appends never looked at what others had altered."""
    with millstream.open(tmp_path / "s", durability="process") as store:
        writer = store.stream("s", segment_bytes=1 << 16)
        writer.append(b"x")
        with millstream.open(tmp_path / "s") as other:
            other.stream("s").alter(durability="sync")
        while writer.durability != "sync":  # at the latest when it rolls
            position = writer.append(bytes(1000))
            assert position.offset < 200
        position = writer.append(b"y")
        assert writer.durable_offset(0) > position.offset


def test_writer_without_syncs_begins_them_when_altered_to_interval(store):
    stream = store.stream("s")
    position = stream.append(b"x")
    stream.alter(durability="interval")
    position = stream.append(b"y")
    until(lambda: stream.durable_offset(0) > position.offset)


def test_partitions_are_added_and_seen_by_every_handle(tmp_path):
    with millstream.open(tmp_path / "s") as store, millstream.open(tmp_path / "s") as other:
        stream, theirs = store.stream("s", partitions=2), other.stream("s")
        stream.append_many([b"%d" % i for i in range(50)], keys=[b"%d" % i for i in range(50)])
        assert theirs.partitions == 2
        assert stream.add_partitions(3) == 5
        assert (stream.partitions, theirs.partitions) == (5, 5)
        for i in range(50):
            key = b"%d" % i
            assert theirs.append(b"", key=key).partition == xxhash.xxh3_64_intdigest(key) % 5
        assert {theirs.append(b"").partition for _ in range(5)} == set(range(5))
        assert theirs.stats().records == 105
        assert theirs.add_partitions(1) == 6
        assert stream.append(b"", partition=5).offset == 0
        for wrong, error in ((0, InvalidArgument), (-1, InvalidArgument), (4096, InvalidArgument),
                             ("1", InvalidType), (1.0, InvalidType)):  # fmt: skip
            with pytest.raises(error):
                stream.add_partitions(wrong)
        assert stream.partitions == 6
    with millstream.open(tmp_path / "s") as store:
        assert store.stream("s", partitions=6).stats().records == 106


# --- offsets and durability -----------------------------------------------------------------------


def test_offsets_count_what_is_there(stream):
    assert (stream.first_offset(0), stream.next_offset(0), stream.durable_offset(0)) == (0, 0, 0)
    stream.append_many([b"x"] * 10)
    assert (stream.first_offset(0), stream.next_offset(0)) == (0, 10)
    stream.flush()
    assert stream.durable_offset(0) == 10


def test_wait_durable_takes_positions_and_spans(store):
    stream = store.stream("p", partitions=2)
    position = stream.append(b"a", partition=0)
    [span] = stream.append_many([b"a", b"b"], partition=1)
    stream.append(b"later", partition=1)
    assert (stream.durable_offset(0), stream.durable_offset(1)) == (0, 0)
    stream.wait_durable(position)
    stream.wait_durable(span, timeout=60)
    assert stream.durable_offset(0) == 1
    assert stream.durable_offset(1) >= 2
    stream.wait_durable(position, timeout=0)
    with pytest.raises(OffsetOutOfRange):
        stream.wait_durable(Position(0, 1, 1))
    with pytest.raises(OffsetOutOfRange):
        stream.wait_durable(Span(1, 1, 0, 5))
    for wrong in (0, None, (0, 1, 0), "x"):
        with pytest.raises(InvalidType):
            stream.wait_durable(wrong)


def test_flush_makes_all_durable_whoever_appended(tmp_path):
    with (
        millstream.open(tmp_path / "s", durability="process") as store,
        millstream.open(tmp_path / "s", durability="process") as other,
    ):
        stream, theirs = store.stream("s", partitions=3), other.stream("s")
        for partition in range(3):
            theirs.append_many([b"x"] * 10, partition=partition)
        stream.flush()
        assert [stream.durable_offset(p) for p in range(3)] == [10] * 3
        theirs.append(b"y", partition=1)
        store.stream("t").append(b"z")
        store.flush()
        assert theirs.durable_offset(1) == 11
        assert store.stream("t").durable_offset(0) == 1


def test_sync_by_many_threads_is_shared(store):
    stream = store.stream("s", durability="sync")
    durable = []

    def work():
        for _ in range(5):
            position = stream.append(b"x")
            durable.append(stream.durable_offset(0) > position.offset)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert durable == [True] * 80


def test_stats_are_sums_of_partitions(store):
    stream = store.stream("p", partitions=3, segment_bytes=1 << 16)
    for partition, count in enumerate((0, 10, 300)):
        for _ in range(count):
            stream.append(bytes(1000), partition=partition)
    stats = stream.stats()
    assert [part.records for part in stats.partitions] == [0, 10, 300]
    assert [part.partition for part in stats.partitions] == [0, 1, 2]
    assert stats.records == 310
    assert stats.log_bytes == sum(part.log_bytes for part in stats.partitions) > 310_000
    assert stats.allocated_bytes == sum(part.allocated_bytes for part in stats.partitions)
    assert [part.segments for part in stats.partitions[:2]] == [0, 1]
    assert stats.partitions[2].segments > 4
    assert {part.health for part in stats.partitions} == {"sound"}
    with pytest.raises(AttributeError):
        stats.records = 0
    assert isinstance(stats, millstream.StreamStats)
    assert isinstance(stats.partitions[0], millstream.PartitionStats)


# --- handles --------------------------------------------------------------------------------------


def test_handles_pickle_by_path_and_name(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", durability="sync")
        again = pickle.loads(pickle.dumps(stream))
        assert again is stream
        assert pickle.loads(pickle.dumps(store)) is store
        data = pickle.dumps((store, stream, store.stream("s")))
    store, stream, plain = pickle.loads(data)
    with store:
        assert stream.store is store
        assert (stream.durability, plain.durability) == ("sync", "sync")
        assert stream.append(b"x").offset == 0


def test_handle_of_a_dropped_stream_does_not_make_it_again(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", partitions=4)
        data = pickle.dumps(stream)
        store.drop_stream("s")
        with pytest.raises(NotFound):
            pickle.loads(data)
        assert store.streams() == []


def test_level_of_a_store_handle_is_pickled(tmp_path):
    millstream.open(tmp_path / "s", durability="interval").close()
    with millstream.open(tmp_path / "s", durability="process") as store:
        data = pickle.dumps(store.stream("s"))
    again = pickle.loads(data)
    assert again.durability == "process"
    again.store.close()


def test_closed_stream_says_so(tmp_path):
    store = millstream.open(tmp_path / "s")
    stream = store.stream("s", partitions=2)
    position = stream.append(b"x", partition=0)
    reader = stream.read(partition=0)
    store.close()
    for call in (
        lambda: stream.append(b"x"),
        lambda: stream.append(b"x", key=b"k"),
        lambda: stream.append_many([b"x"]),
        lambda: stream.append_many([b"x"], keys=[b"k"]),
        lambda: stream.read(),
        lambda: stream.aread(),
        lambda: next(reader),
        lambda: stream.stats(),
        lambda: stream.flush(),
        lambda: stream.first_offset(0),
        lambda: stream.next_offset(0),
        lambda: stream.durable_offset(0),
        lambda: stream.offset_at(0, 0),
        lambda: stream.wait_durable(position),
        lambda: stream.alter(),
        lambda: stream.add_partitions(1),
        lambda: stream.enforce_retention(),
        lambda: stream.delete_before(position),
        lambda: store.stream("s"),
        lambda: store.streams(),
        lambda: store.flush(),
        lambda: store.drop_stream("s"),
        lambda: store.backup(tmp_path / "b"),
    ):
        with pytest.raises(Closed) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        assert "closed" in str(caught.value)
    assert "closed" in repr(stream)
    assert "closed" in repr(store)
    store.close()


def test_closing_under_appending_threads_ends_them_with_closed(tmp_path):
    for _ in range(5):
        store = millstream.open(tmp_path / "s", durability="process")
        stream = store.stream("s", partitions=2, segment_bytes=1 << 16)
        before = stream.stats().records
        ended, counted = [], [0] * 4

        def work(i, stream=stream, ended=ended, counted=counted):
            try:
                while True:
                    stream.append(bytes(500))
                    counted[i] += 1
            except Closed as error:
                ended.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        until(lambda counted=counted: min(counted) >= 20)
        store.close()
        for thread in threads:
            thread.join(30)
        assert len(ended) == 4
        with millstream.open(tmp_path / "s") as store:
            assert store.stream("s").stats().records - before >= sum(counted)


def test_stored_configuration_is_json_with_a_checksum(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        store.stream("s")
    for path in ("store.json", "streams/s/stream.json"):
        document = json.loads((tmp_path / "s" / path).read_text())
        canonical = json.dumps(document["body"], sort_keys=True, separators=(",", ":")).encode()
        assert document["checksum"] == f"{xxhash.xxh3_64_intdigest(canonical):016x}"
