"""The public face, line by line: what other programs rely on."""

import asyncio
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import numpy as np
import pytest
from timing import SOON

import millstream
from millstream import InvalidArgument, InvalidType, LimitExceeded, Position, Retention, Span


@pytest.fixture
def store():
    with millstream.temporary() as store:
        yield store


def values(stream, **options):
    return [value for batch in stream.read(**options) for value in batch.values]


def test_append_returns_positions_that_count_up(store):
    stream = store.stream("s")
    first = stream.append(b"a", key=b"k", headers={"src": b"demo"}, timestamp=5)
    assert first == Position(0, 1, 0) and tuple(first) == (0, 1, 0)
    assert stream.append(b"b").offset == 1
    assert pickle.loads(pickle.dumps(first)) == first
    [batch] = stream.read()
    assert list(batch.keys) == [b"k", None]
    assert list(batch.headers) == [{"src": b"demo"}, {}]
    assert batch.timestamps[0] == 5
    assert batch.offsets.tolist() == [0, 1]


@pytest.mark.parametrize(
    "value", [b"xyz", bytearray(b"xyz"), memoryview(b"xyz"), np.frombuffer(b"xyz", "u1")]
)
def test_value_may_be_anything_bytes_like(store, value):
    stream = store.stream("s")
    stream.append(value, key=value)
    assert values(stream) == [b"xyz"]


def test_null_value_is_kept_with_and_without_key(store):
    stream = store.stream("s")
    stream.append(None, key=b"k")
    stream.append(None)
    stream.append(b"")
    assert values(stream) == [None, None, b""]


def test_key_chooses_the_partition_and_turns_go_round_without(store):
    stream = store.stream("s", partitions=4)
    for i in range(50):
        key = b"%d" % i
        assert stream.append(b"v", key=key).partition == stream.partition_for(key)
    assert {stream.append(b"v").partition for _ in range(4)} == {0, 1, 2, 3}
    assert stream.append(b"v", key=b"k", partition=2).partition == 2


def test_append_many_splits_by_key_and_keeps_order(store):
    stream = store.stream("s", partitions=4)
    keys = [b"%d" % (i % 10) for i in range(1000)]
    spans = stream.append_many([b"%d" % i for i in range(1000)], keys=keys)
    assert all(isinstance(span, Span) for span in spans)
    assert sum(span.count for span in spans) == 1000
    for batch in stream.read():
        rows = [int(value) for value in batch.values]
        assert rows == sorted(rows)
        assert all(stream.partition_for(key) == batch.partition for key in batch.keys)


def test_append_many_without_keys_stays_whole(store):
    stream = store.stream("s", partitions=4)
    [span] = stream.append_many([b"a", None, b"c"], timestamps=[3, 1, 2])
    [batch] = stream.read(partition=span.partition)
    assert list(batch.values) == [b"a", None, b"c"]
    assert batch.timestamps.tolist() == [3, 1, 2]


def test_one_bad_element_appends_nothing(store):
    stream = store.stream("s", partitions=2)
    for bad in (5, "text", object()):
        with pytest.raises(InvalidType, match="element 2"):
            stream.append_many([b"a", b"b", bad], keys=[b"1", b"2", b"3"])
    with pytest.raises(LimitExceeded, match="element 1"):
        stream.append_many([b"a", b"b"], keys=[b"1", b"x" * 70_000])
    with pytest.raises(InvalidArgument):
        stream.append_many([b"a", b"b"], keys=[b"1"])
    assert values(stream) == []
    assert stream.append_many([]) == []


def test_numpy_and_structured_values_come_back_as_one_view(store):
    stream = store.stream("s")
    data = np.zeros(1000, np.dtype([("a", "<i8"), ("b", "S12")]))
    data["a"] = np.arange(1000)
    data["b"] = b"name"
    stamps = np.arange(1000).astype("M8[us]")
    stream.append_many(data, keys=data["b"], timestamps=stamps)
    [batch] = stream.read()
    view = batch.values_as(data.dtype)
    assert (view == data).all()
    assert not view.flags.writeable and not view.flags.owndata
    assert batch.keys[0] == b"name"
    assert batch.timestamps.tolist() == list(range(1000))
    with pytest.raises(InvalidArgument):
        batch.values_as("<i4")
    stream.append_many(np.arange(12, dtype="u1").reshape(3, 4)[::2])
    assert values(stream, start=1000) == [bytes([0, 1, 2, 3]), bytes([8, 9, 10, 11])]


def test_large_batch_is_a_view_of_the_file_and_outlives_the_store():
    with millstream.temporary() as store:
        stream = store.stream("s")
        stream.append_many([b"x" * 100] * 1000)
        [one] = stream.read()
        [two] = stream.read()
        assert np.shares_memory(one.values.data, two.values.data)
        data, column = one.values.data, one.values
    assert data[0] == ord("x") and column[999] == b"x" * 100
    with pytest.raises(ValueError):
        data[0] = 1


def test_small_batches_are_gathered_with_all_their_columns(store):
    stream = store.stream("s")
    expected = []
    for i in range(500):
        key = b"k%d" % i if i % 3 else None
        value = b"v%d" % i if i % 5 else None
        headers = {"h": b"%d" % i} if i % 7 == 0 else None
        stream.append(value, key=key, headers=headers, timestamp=i)
        expected.append((i, i, key, value, headers or {}))
    found, sizes = [], []
    for batch in stream.read():
        sizes.append(len(batch))
        columns = (batch.offsets, batch.timestamps, batch.keys, batch.values, batch.headers)
        found += zip(*columns, strict=True)
    assert found == expected
    assert max(sizes) > 100


@pytest.mark.parametrize("start", [0, 1, 7, 499, 500, 999])
def test_read_begins_at_any_offset_of_any_batch(store, start):
    stream = store.stream("s", segment_bytes=1 << 16)
    for i in range(0, 500, 10):
        stream.append_many([b"%d" % j for j in range(i, i + 10)])
    stream.append_many([b"%d" % i + b"x" * 200 for i in range(500, 1000)])
    assert int(values(stream, start=start, max_records=1)[0].rstrip(b"x")) == start
    assert len(values(stream, start=start)) == 1000 - start


def test_read_by_position_time_and_word(store):
    stream = store.stream("s")
    for i in range(100):
        stream.append(b"%d" % i, timestamp=1_000_000 * i)
    assert values(stream, start=Position(0, 1, 98)) == [b"98", b"99"]
    assert values(stream, start=datetime.fromtimestamp(97.5, UTC)) == [b"98", b"99"]
    assert stream.offset_at(50_000_000, 0) == 50
    assert stream.offset_at(10**12, 0) == 100
    assert values(stream, start="latest") == []
    assert len(values(stream, start="earliest", max_records=7)) == 7
    with pytest.raises(millstream.OffsetOutOfRange) as caught:
        stream.read(partition=0, start=101)
    assert (caught.value.first, caught.value.next) == (0, 100)
    for bad in ("soon", 1.5, None):
        with pytest.raises((InvalidArgument, InvalidType)):
            stream.read(start=bad)
    with pytest.raises(millstream.NotFound):
        stream.read(partition=1)


def test_follow_ends_at_the_time_out_and_async_read_sees_what_comes(store):
    stream = store.stream("s")
    stream.append(b"1")
    began = time.monotonic()
    assert values(stream, follow=True, timeout=0.05) == [b"1"]
    assert time.monotonic() - began < SOON

    async def main():
        found = []

        async def reader():
            async for batch in stream.aread(follow=True):
                found.extend(batch.values)
                if len(found) == 3:
                    return

        task = asyncio.create_task(reader())
        for value in (b"2", b"3"):
            await asyncio.sleep(0)
            stream.append(value)
        await asyncio.wait_for(task, 20)
        other = asyncio.create_task(anext(stream.aread(follow=True, start="latest")))
        await asyncio.sleep(0)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        return found

    assert asyncio.run(main()) == [b"1", b"2", b"3"]


def test_durable_read_shows_only_what_is_synced():
    with millstream.temporary(durability="process") as store:
        stream = store.stream("s")
        position = stream.append(b"1")
        assert stream.durable_offset(0) == 0
        assert values(stream, durable=True) == []
        stream.wait_durable(position)
        assert stream.durable_offset(0) == 1
        assert values(stream, durable=True) == [b"1"]
        stream.append(b"2", durability="sync")
        assert stream.durable_offset(0) == 2
        stream.append(b"3")
        stream.flush()
        assert stream.durable_offset(0) == stream.next_offset(0) == 3


def test_retention_removes_whole_segments_and_readers_are_told(store):
    stream = store.stream("s", segment_bytes=1 << 16, retention=Retention(records=100))
    batch = next(iter([stream.append_many([b"x" * 500] * 20)]))
    del batch
    held = next(iter(stream.read()))
    for _ in range(60):
        stream.append_many([b"x" * 500] * 20)
    stream.enforce_retention()
    first = stream.first_offset(0)
    assert 100 <= 1220 - first < 400
    assert held.values[0] == b"x" * 500
    with pytest.raises(millstream.OffsetOutOfRange) as caught:
        values(stream, start=0)
    assert caught.value.first == first
    assert len(values(stream, start=0, on_lost="earliest")) == 1220 - first
    position = Position(0, 1, first + 90)
    assert first <= stream.delete_before(position) <= position.offset
    stream.alter(retention=Retention(bytes="10GiB", age="30d"))
    assert stream.retention == Retention(bytes=10 << 30, age=30 * 86400.0)


def test_settings_are_stored_and_mismatches_refused(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        store.stream("a", partitions=3)
        with pytest.raises(millstream.ConfigMismatch, match="partitions"):
            store.stream("a", partitions=4)
    with millstream.open(tmp_path / "s") as store:
        assert store.durability == "process"
        stream = store.stream("a")
        assert stream.partitions == 3
        assert stream.add_partitions(2) == 5
        assert stream.append(b"x", partition=4).partition == 4
        assert store.streams() == ["a"]
        store.drop_stream("a")
        assert store.streams() == []
        with pytest.raises(millstream.Closed):
            stream.append(b"x")
    with pytest.raises(millstream.NotFound), millstream.open(tmp_path / "none", mode="r"):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".x", "a\0b", "ä", "x" * 129, "a b", "~\n"])
def test_names_never_become_paths(store, name):
    with pytest.raises(InvalidArgument):
        store.stream(name)


def test_read_only_store_reads_and_refuses_to_write(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        store.stream("a").append(b"1")
        with millstream.open(tmp_path / "s", mode="r") as reader:
            assert values(reader.stream("a")) == [b"1"]
            store.stream("a").append(b"2")
            assert values(reader.stream("a")) == [b"1", b"2"]
            with pytest.raises(millstream.Unsupported):
                reader.stream("a").append(b"3")
    with millstream.open(tmp_path / "s", mode="r") as reader:
        assert values(reader.stream("a")) == [b"1", b"2"]


def test_read_only_store_beside_a_writer_misses_no_append_at_a_roll(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("a", segment_bytes="64KiB")
        with millstream.open(tmp_path / "s", mode="r") as reader:
            other = reader.stream("a")
            assert other.next_offset(0) == 0  # before anyone has walked the partition
            for _ in range(20):
                for _ in range(8):
                    position = stream.append(bytes(4000))
                    assert other.next_offset(0) == position.offset + 1
                stream.flush()  # spares are made meanwhile, and the reader maps them


def _append(stream, name, count):
    for i in range(count):
        stream.append_many([b"%d %d %d" % (name, i, j) for j in range(3)])


def test_eight_processes_append_to_one_partition_in_whole_batches(tmp_path):
    context = multiprocessing.get_context("spawn")
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("a", segment_bytes=1 << 16)
        workers = [context.Process(target=_append, args=(stream, n, 300)) for n in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
        found = [tuple(map(int, value.split())) for value in values(stream)]
        assert len(found) == len(set(found)) == 8 * 300 * 3
        for at in range(0, len(found), 3):
            assert [row[2] for row in found[at : at + 3]] == [0, 1, 2]
            assert len({row[:2] for row in found[at : at + 3]}) == 1
        for name in range(8):
            own = [row[1:] for row in found if row[0] == name]
            assert own == sorted(own)


def test_control_c_ends_a_waiting_reader(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        store.stream("a").append(b"1")
        program = (
            f"import millstream\nstore = millstream.open({str(tmp_path / 's')!r})\n"
            "for batch in store.stream('a').read(follow=True): print(len(batch), flush=True)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
        assert b"KeyboardInterrupt" in errors


def test_backup_is_a_whole_store(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("a", partitions=3)
        stream.append_many([b"%d" % i for i in range(100)], keys=[b"%d" % i for i in range(100)])
        store.stream("empty")
        store.backup(tmp_path / "copy")
        stream.append(b"later")
        with pytest.raises(millstream.StorageError):
            store.backup(tmp_path / "copy")
    with millstream.open(tmp_path / "copy") as copy:
        assert sorted(values(copy.stream("a"))) == sorted(b"%d" % i for i in range(100))
        assert copy.streams() == ["a", "empty"]
