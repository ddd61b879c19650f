"""Idempotent producers: what is sent again adds nothing, whatever happened in between."""

import multiprocessing
import os
import pickle
import threading

import pytest

import millstream
from millstream import Retention, _native, inspect
from millstream.disk import files
from millstream.errors import (
    Closed,
    CorruptBatch,
    InvalidArgument,
    InvalidType,
    LimitExceeded,
    Unsupported,
)
from millstream.log import sequences
from millstream.log.producer_ids import ProducerIds, ids_of

HIGHEST = 2**63 - 2


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def values(stream, partition=None):
    return [bytes(v) for batch in stream.read(partition=partition) for v in batch.values]


def fill(producer, first, count, size=100, **options):
    """Records that say their sequence, some of which make small segments roll."""
    for sequence in range(first, first + count):
        producer.append(b"%d " % sequence + b"x" * size, sequence=sequence, **options)


def numbers(stream, partition=None):
    return [int(value.split()[0]) for value in values(stream, partition)]


# --- what a re-send is ----------------------------------------------------------------------------


def test_a_record_sent_again_adds_nothing_and_says_so(store):
    producer = store.stream("s").producer(id="ingest-7")
    first = producer.append(b"a", sequence=5)
    assert first == (0, 1, 0)
    assert producer.append(b"a", sequence=5) is None
    assert producer.append(b"late", sequence=3) is None
    assert producer.append(b"b", sequence=9).offset == 1  # gaps are fine
    assert values(store.stream("s")) == [b"a", b"b"]


def test_of_a_list_sent_again_only_the_new_rest_is_appended(store):
    stream = store.stream("s")
    producer = stream.producer("p")
    assert producer.append_many([b"0", b"1", b"2"], first_sequence=0) == [(0, 1, 0, 3)]
    assert producer.append_many([b"1", b"2"], first_sequence=1) == []
    times = [10, 20, 30, 40]
    (span,) = producer.append_many(
        [b"1", b"2", b"3", b"4"],
        first_sequence=1,
        keys=[b"k1", b"k2", b"k3", b"k4"],
        headers=[{"h": b"1"}, {"h": b"2"}, {"h": b"3"}, None],
        timestamps=times,
    )
    assert span == (0, 1, 3, 2)
    assert values(stream) == [b"0", b"1", b"2", b"3", b"4"]
    (batch,) = stream.read(start=3)
    assert list(batch.keys) == [b"k3", b"k4"]
    assert list(batch.headers) == [{"h": b"3"}, {}]
    assert list(batch.timestamps) == [30, 40]
    assert producer.append_many([], first_sequence=0) == []


def test_sequences_may_be_any_iterable_of_ints(store):
    producer = store.stream("s").producer(id="p")
    assert producer.append_many([b"1", b"2"], sequences=iter([1, 2]))[0].count == 2
    assert producer.append_many([b"2", b"3"], sequences={2: "", 3: ""})[0].count == 1
    with pytest.raises(millstream.InvalidType, match="sequences 5"):
        producer.append_many([b"4"], sequences=5)


def test_rising_sequences_with_gaps(store):
    stream = store.stream("s")
    producer = stream.producer("p")
    producer.append_many([b"1", b"5", b"9"], sequences=[1, 5, 9])
    (span,) = producer.append_many([b"4", b"9", b"12"], sequences=[4, 9, 12])
    assert span.count == 1
    assert values(stream) == [b"1", b"5", b"9", b"12"]
    assert producer.last_sequence == 12


def test_producers_know_nothing_of_each_other(store):
    stream = store.stream("s")
    one, two = stream.producer("one"), stream.producer("two")
    one.append(b"1", sequence=7)
    assert two.last_sequence == -1
    assert two.append(b"2", sequence=7) is not None
    assert stream.append(b"plain").offset == 2
    assert stream.producer("one").append(b"1", sequence=7) is None  # the id is what counts
    other = store.stream("other").producer("one")
    assert other.append(b"3", sequence=7) is not None


def test_null_and_other_buffers_are_values_too(store):
    stream = store.stream("s")
    producer = stream.producer("p")
    producer.append(None, sequence=0, key=b"k")
    producer.append(bytearray(b"b"), sequence=1, headers={"h": b"v"}, timestamp=17)
    assert producer.append(memoryview(b"b"), sequence=1) is None
    (batch,) = stream.read()
    assert list(batch.values) == [None, b"b"]
    assert list(batch.headers) == [{}, {"h": b"v"}]


def test_the_highest_sequence_is_the_last(store):
    producer = store.stream("s").producer("p")
    producer.append(b"", sequence=HIGHEST)
    assert producer.last_sequence == HIGHEST
    assert producer.append(b"", sequence=HIGHEST) is None


# --- partitions -----------------------------------------------------------------------------------


def test_partition_comes_from_key_or_sequence_so_a_resend_meets_its_first_copy(store):
    stream = store.stream("s", partitions=4)
    producer = stream.producer("p")
    for sequence in range(40):
        key = b"k%d" % sequence if sequence % 3 else None
        wanted = sequence % 4 if key is None else stream.partition_for(key)
        assert producer.append(b"%d" % sequence, sequence=sequence, key=key).partition == wanted
    keys = [b"k%d" % n if n % 3 else None for n in range(50)]
    spans = producer.append_many([b"%d" % n for n in range(50)], first_sequence=0, keys=keys)
    assert sum(span.count for span in spans) == 10
    for partition in range(4):
        found = numbers(stream, partition)
        assert found == sorted(found)
    assert sorted(numbers(stream)) == list(range(50))
    assert producer.last_sequence == 49
    assert max(producer.last_sequences) == 49
    assert producer.append(b"x", sequence=60, partition=2).partition == 2
    assert producer.append(b"x", sequence=60, partition=2) is None


def test_a_call_that_a_kill_cut_between_partitions_does_not_count_until_it_is_whole(store):
    stream = store.stream("s", partitions=4)
    producer = stream.producer("p")
    producer.append_many([b"%d" % n for n in range(8)], first_sequence=0)
    native = stream._partition(2).native
    native.set_poison(1)  # refuses, before the share with the last record is published
    with pytest.raises(millstream.Poisoned) as caught:
        producer.append_many([b"%d" % n for n in range(8, 20)], first_sequence=8)
    native.set_poison(0)
    assert sum(span.count for span in caught.value.appended) == 6  # partitions 0 and 1
    assert producer.last_sequence == 7
    assert producer.last_sequences == (16, 17, 6, 7)
    begin = producer.last_sequence + 1
    spans = producer.append_many([b"%d" % n for n in range(begin, 20)], first_sequence=begin)
    assert sorted(span.partition for span in spans) == [2, 3]
    assert producer.last_sequence == 19
    assert sorted(numbers(stream)) == list(range(20))


def test_partitions_that_are_added_get_their_table(store):
    stream = store.stream("s", partitions=1)
    producer = stream.producer("p")
    fill(producer, 0, 10)
    stream.add_partitions(2)
    assert producer.last_sequences == (9, -1, -1)
    fill(producer, 10, 9)
    assert producer.last_sequence == 18
    assert sorted(numbers(stream)) == list(range(19))


# --- restarts, retention, other processes ---------------------------------------------------------


def test_resends_are_known_after_restarts_and_retention_of_all_earlier_segments(tmp_path):
    path = tmp_path / "store"
    for turn in range(4):
        with millstream.open(path, durability="process") as store:
            stream = store.stream("s", partitions=2, segment_bytes=1 << 16)
            producers = [stream.producer(f"p{i}") for i in range(3)]
            for producer in producers:
                assert producer.last_sequence == turn * 1000 - 1
                fill(producer, max(0, turn * 1000 - 500), 1500 if turn else 1000)
            for partition in range(2):
                stream.delete_before(
                    millstream.Position(partition, turn + 1, stream.next_offset(partition))
                )
                assert len(stream._log(partition).segments.current()) == 1
            assert [p.append(b"again", sequence=17) for p in producers] == [None] * 3
            if turn == 1:
                store._set_clean = lambda: None  # as after an unclean end
        assert not inspect.verify(path).problems
    with millstream.open(path) as store:
        stream = store.stream("s")
        assert stream.producer("p1").last_sequences == (3998, 3999)
        assert stream.first_offset(0) > 5000  # of 6,000: no header of the first rounds is left


def test_a_second_opener_sees_what_the_first_appended(tmp_path):
    with (
        millstream.open(tmp_path / "s", durability="process") as one,
        millstream.open(tmp_path / "s", durability="process") as two,
    ):
        first = one.stream("s", segment_bytes=1 << 16).producer("p")
        second = two.stream("s").producer("p")
        for begin, count in ((0, 1), (1, 10), (11, 300), (311, 5000), (5311, 1)):
            fill(first, begin, count)
            assert second.append(b"again", sequence=begin + count - 1) is None
            fill(second, begin, count + 3)
            assert first.last_sequence == begin + count + 2
            assert first.append(b"again", sequence=begin + count + 2) is None
        assert numbers(one.stream("s")) == list(range(5315))
        one.stream("s").producer("new")
        assert two.stream("s").producer("new")._number == one.stream("s").producer("new")._number


def test_one_who_was_far_behind_retention_reads_what_was_saved(tmp_path):
    with (
        millstream.open(tmp_path / "s", durability="process") as one,
        millstream.open(tmp_path / "s", durability="process") as two,
    ):
        first = one.stream("s", segment_bytes=1 << 16).producer("p")
        second = two.stream("s").producer("p")
        fill(first, 0, 10)
        assert second.append(b"", sequence=9) is None
        one.stream("s").producer("gone").append(b"", sequence=99)
        fill(first, 10, 3000)
        one.stream("s").delete_before(millstream.Position(0, 1, 3000))
        assert second.append(b"again", sequence=2000) is None
        assert two.stream("s").producer("gone").append(b"again", sequence=99) is None
        assert second.last_sequence == 3009


def test_batches_without_producer_between_are_passed_over(store):
    stream = store.stream("s", segment_bytes=1 << 16)
    producer = stream.producer("p")
    for sequence in range(50):
        stream.append_many([b"plain" * 20] * 30)
        assert producer.append(b"p", sequence=sequence) is not None
        assert producer.append(b"p", sequence=sequence) is None
    assert producer.last_sequence == 49


def test_many_threads_with_one_id_add_each_record_once(store):
    stream = store.stream("s", partitions=3, segment_bytes=1 << 16)
    failures = []

    def send():
        try:
            producer = stream.producer("p")
            for begin in range(0, 2000, 20):
                producer.append_many([b"%d" % n for n in range(begin, begin + 20)],
                                     first_sequence=begin)  # fmt: skip
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(numbers(stream)) == list(range(2000))


def _send(path, which, count):
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s")
        producer = stream.producer("shared")
        mine = stream.producer(f"own{which}")
        for sequence in range(count):
            producer.append(b"%d" % sequence, sequence=sequence)
            mine.append(b"-1", sequence=sequence)


def test_processes_with_one_id_and_registering_at_once_add_each_record_once(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        store.stream("s", partitions=2, segment_bytes=1 << 16)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_send, args=(path, i, 1500)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with millstream.open(path) as store:
        stream = store.stream("s")
        found = numbers(stream)
        assert sorted(n for n in found if n >= 0) == list(range(1500))
        assert found.count(-1) == 3 * 1500
        assert sorted(ids_of(stream)._numbers) == [] and stream.stats().producers == 4
    assert not inspect.verify(path).problems


def test_backup_holds_what_producers_sent(tmp_path):
    with millstream.open(tmp_path / "a", durability="process") as store:
        stream = store.stream("s", partitions=2, segment_bytes=1 << 16)
        producer = stream.producer("p")
        fill(producer, 0, 3000)
        stream.delete_before(millstream.Position(0, 1, 1400))
        store.backup(tmp_path / "b")
        fill(producer, 3000, 10)
    assert not inspect.verify(tmp_path / "b").problems
    for turn in range(2):
        with millstream.open(tmp_path / "b") as store:
            producer = store.stream("s").producer("p")
            assert producer.last_sequence == 2999 + turn
            assert producer.append(b"0", sequence=1) is None
            assert producer.append(b"0", sequence=3000 + turn) is not None
        assert not inspect.verify(tmp_path / "b").problems


# --- durability -----------------------------------------------------------------------------------


def test_a_resend_at_sync_waits_until_its_first_copy_is_durable(store):
    stream = store.stream("s", partitions=2)
    producer = stream.producer("p")
    producer.append_many([b"0", b"1"], first_sequence=0)
    assert stream.durable_offset(0) == stream.durable_offset(1) == 0
    assert producer.append(b"0", sequence=0, durability="sync") is None
    assert stream.durable_offset(0) == 1
    assert producer.append_many([b"0", b"1"], first_sequence=0, durability="sync") == []
    assert stream.durable_offset(1) == 1


def test_at_sync_the_other_shares_are_durable_before_the_last_is_published(store, monkeypatch):
    stream = store.stream("s", partitions=3)
    producer = stream.producer("p")
    producer.append_many([b"0", b"1", b"2"], first_sequence=0)
    seen = []
    make = stream._make_durable

    def noted(index, end, timeout):
        seen.append((index, stream.next_offset(0)))
        make(index, end, timeout)

    monkeypatch.setattr(type(stream), "_make_durable", lambda self, *rest: noted(*rest))
    producer.append_many([b"%d" % n for n in range(3, 7)], first_sequence=3, durability="sync")
    assert [index for index, _ in seen[:2]] == [1, 2]
    assert [offset for _, offset in seen[:2]] == [1, 1]  # of partition 0, which has sequence 6
    assert stream.next_offset(0) == stream.durable_offset(0) == 3


def test_the_table_is_saved_in_the_background_when_segments_are_sealed_and_synced(tmp_path):
    with millstream.open(tmp_path / "s", durability="interval") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        producer = stream.producer("p")
        fill(producer, 0, 2000)
        log = stream._log(0)
        log.sync()
        log.sequences.save_sealed()
        assert log.sequences.saved_at == log._sealed_end()[0] > 0
        before = files.content(os.path.join(log.path, "sequences"))
        log.sequences.save_sealed()
        assert files.content(os.path.join(log.path, "sequences")) == before
    (batch, *_) = inspect.batches(tmp_path / "s", "s", 0)
    assert (batch.producer, batch.sequence) == (1, 0)


# --- the file of ids ------------------------------------------------------------------------------


def test_ids_keep_their_numbers_and_may_be_any_text(tmp_path):
    names = ["ingest-7", "é:/\\ x\n", "日" * 128, "a", " "]
    for turn in range(2):
        with millstream.open(tmp_path / "s") as store:
            stream = store.stream("s")
            assert stream.stats().producers == (len(names) if turn else 0)
            assert [stream.producer(name)._number for name in names] == [1, 2, 3, 4, 5]
            assert stream.stats().producers == len(names)
    assert [d["id"] for d in inspect.dump(tmp_path / "s", json=True) if d["item"] == "producer"] \
        == names  # fmt: skip


def test_an_entry_whose_writer_died_is_written_over_and_damage_is_not(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        for name in ("one", "two"):
            stream.producer(name)
    path = tmp_path / "s" / "streams" / "s" / "producers"
    whole = path.read_bytes()
    for cut in range(len(whole) - 23, len(whole) - 5):
        path.write_bytes(whole[:cut] + bytes(5))
        with millstream.open(tmp_path / "s") as store:
            stream = store.stream("s")
            assert stream.producer("new")._number == 2
            assert stream.producer("one")._number == 1
    damaged = bytearray(whole + bytes(600))
    damaged[60] ^= 1
    path.write_bytes(damaged)
    with millstream.open(tmp_path / "s") as store, pytest.raises(CorruptBatch, match="byte 56"):
        store.stream("s").producer("one")
    assert path.read_bytes() == damaged
    assert [p.kind for p in inspect.verify(tmp_path / "s").problems] == ["producers"]
    path.write_bytes(b"x" * 100)
    with millstream.open(tmp_path / "s") as store, pytest.raises(CorruptBatch, match="producers"):
        store.stream("s").producer("one")


def test_an_entry_that_another_process_did_not_sync_is_synced_before_its_number_is_used(
    store, monkeypatch
):
    stream = store.stream("s")
    stream.producer("a")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", lambda descriptor, path: None)  # as if killed before it
        ProducerIds(stream).number("b")
    synced = []
    sync = files.sync
    monkeypatch.setattr(
        files, "sync", lambda descriptor, path: (synced.append(path), sync(descriptor, path))
    )
    assert stream.stats().producers == 2  # which reads it, and syncs nothing
    assert not synced
    assert stream.producer("a")._number == 1
    assert synced == [f"{stream.path}/producers"]
    assert stream.producer("b")._number == 2
    assert len(synced) == 1


def test_thousands_of_ids_take_time_and_space_by_their_number_alone(store, monkeypatch):
    stream = store.stream("s", segment_bytes=1 << 16)
    monkeypatch.setattr(files, "sync", lambda descriptor, path: None)
    reads = []
    read = files.read
    monkeypatch.setattr(
        files, "read", lambda d, n, at, path: (reads.append(n), read(d, n, at, path))[1]
    )
    for i in range(3000):
        assert stream.producer(f"producer-{i}").append(b"%d" % i, sequence=i) is not None
    assert sum(reads) < 3000 * 1000
    again = store.stream("s", durability="interval")  # a handle that knows nothing yet
    for i in (0, 17, 2999):
        assert again.producer(f"producer-{i}").append(b"x", sequence=i) is None
    stream.delete_before(millstream.Position(0, 1, 3000))
    assert os.path.getsize(os.path.join(stream.path, "00000", "sequences")) <= 72 + 24 * 3000


# --- bad input, handles ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "error"),
    [(-1, InvalidArgument), (HIGHEST + 1, InvalidArgument), (1 << 70, InvalidArgument),
     ("1", InvalidType), (1.0, InvalidType), (None, InvalidArgument)],
)  # fmt: skip
def test_bad_sequences_are_refused_and_nothing_is_appended(store, sequence, error):
    stream = store.stream("s")
    producer = stream.producer("p")
    with pytest.raises((error, InvalidType)):
        producer.append(b"x", sequence=sequence)
    with pytest.raises(error):
        producer.append_many([b"x"], first_sequence=sequence)
    if sequence is not None:
        with pytest.raises(error):
            producer.append_many([b"x"], sequences=[sequence])
    assert stream.next_offset(0) == 0


def test_bad_lists_are_refused_and_nothing_is_appended(store):
    stream = store.stream("s", partitions=2)
    producer = stream.producer("p")
    for options in (
        {"sequences": [1, 1]},
        {"sequences": [2, 1]},
        {"sequences": [1]},
        {},
        {"first_sequence": 0, "sequences": [0, 1]},
        {"first_sequence": HIGHEST},
        {"first_sequence": 0, "keys": [b"1"]},
    ):
        with pytest.raises(InvalidArgument):
            producer.append_many([b"a", b"b"], **options)
    with pytest.raises(LimitExceeded):
        producer.append_many([b"a", b"b"], first_sequence=0, keys=[b"k", b"k" * 70_000])
    with pytest.raises(TypeError):
        producer.append(b"x")
    assert stream.next_offset(0) == stream.next_offset(1) == 0
    assert producer.last_sequence == -1


@pytest.mark.parametrize("name", ["", "x" * 129, "\ud800"])
def test_ids_have_1_to_128_characters(store, name):
    with pytest.raises(InvalidArgument):
        store.stream("s").producer(id=name)
    with pytest.raises(InvalidType):
        store.stream("s").producer(id=7)
    assert store.stream("s").stats().producers == 0


def test_a_closed_producer_refuses_use(tmp_path):
    store = millstream.open(tmp_path / "s")
    with store.stream("s").producer("p") as producer:
        producer.append(b"x", sequence=0)
        assert "closed" not in repr(producer)
    assert producer.closed and "closed" in repr(producer)
    for call in (
        lambda: producer.append(b"x", sequence=1),
        lambda: producer.append_many([b"x"], first_sequence=1),
        lambda: producer.last_sequence,
    ):
        with pytest.raises(Closed):
            call()
    producer.close()
    open_one = store.stream("s").producer("p")
    store.close()
    assert open_one.closed
    with pytest.raises(Closed):
        open_one.append(b"x", sequence=1)


def test_a_read_only_store_has_no_producers_and_reads_what_they_appended(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        store.stream("s").producer("p").append(b"x", sequence=0)
    with millstream.open(tmp_path / "s", mode="r") as store:
        with pytest.raises(Unsupported):
            store.stream("s").producer("p")
        assert store.stream("s").stats().producers == 1
        assert values(store.stream("s")) == [b"x"]


def test_a_producer_pickles_by_stream_and_id(store):
    producer = store.stream("s").producer("p")
    producer.append(b"x", sequence=3)
    again = pickle.loads(pickle.dumps(producer))
    assert again.id == "p" and again.append(b"x", sequence=3) is None


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_table_is_refused_verified_and_repaired(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        fill(stream.producer("old"), 0, 600)
        fill(stream.producer("new"), 0, 600)
        stream.delete_before(millstream.Position(0, 1, 1000))
    assert not inspect.verify(path).problems
    table = path / "streams" / "s" / "00000" / "sequences"
    whole = table.read_bytes()
    for at in (0, 8, 12, 20, 40, 50, 64, 75, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        table.write_bytes(damaged)
        assert "sequences" in [p.kind for p in inspect.verify(path).problems] or at == 8
        with millstream.open(path) as store, pytest.raises(CorruptBatch, match="sequences"):
            store.stream("s").producer("old").append(b"x", sequence=1)
    table.write_bytes(whole[:30])
    with millstream.open(path) as store:
        with pytest.raises(CorruptBatch, match="30 bytes"):
            store.stream("s").producer("old").append(b"x", sequence=1)
        with pytest.raises(CorruptBatch):
            store.stream("s").producer("old").last_sequence  # noqa: B018
        assert store.stream("s").append(b"plain") is not None
    (action, *_) = inspect.repair(path)
    assert action.kind == "sequences"
    assert not inspect.verify(path).problems
    with millstream.open(path) as store:
        assert store.stream("s").producer("new").append(b"x", sequence=599) is None


def test_damage_that_a_table_would_have_to_read_is_refused(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        fill(stream.producer("p"), 0, 700)
        stream.delete_before(millstream.Position(0, 1, 500))
        active = stream._log(0).segments.current()[-1]
    segment = path / "streams" / "s" / "00000" / f"{active:016d}.seg"
    damaged = bytearray(segment.read_bytes())
    damaged[12288 + 176 * 20 + 100] ^= 1
    segment.write_bytes(damaged)
    with millstream.open(path) as store:  # closed cleanly: nothing walks it before
        producer = store.stream("s").producer("p")
        for call in (
            lambda: producer.append(b"x", sequence=700),
            lambda: producer.last_sequence,
        ):
            with pytest.raises(CorruptBatch, match=segment.name):
                call()
        assert store.stream("s").append(b"plain").offset == 700


def test_one_who_reads_while_retention_takes_it_away_goes_on(tmp_path, monkeypatch):
    with (
        millstream.open(tmp_path / "s", durability="process") as one,
        millstream.open(tmp_path / "s", durability="process") as two,
    ):
        first = one.stream("s", segment_bytes=1 << 16).producer("p")
        second = two.stream("s").producer("p")
        fill(first, 0, 10)
        assert second.last_sequence == 9
        fill(first, 10, 300)
        log = two.stream("s")._log(0)
        between, turns = log.segments.between, []

        def slow(begin, end):
            if not turns:  # the log rolls, and its beginning goes, before it is looked at
                turns.append(begin)
                fill(first, 310, 1500)
                one.stream("s").delete_before(millstream.Position(0, 1, 1800))
            return between(begin, end)

        monkeypatch.setattr(log.segments, "between", slow)
        assert second.last_sequence >= 309
        assert second.append(b"again", sequence=1000) is None
        assert second.last_sequence == 1809
        assert turns


def test_verify_tells_a_table_that_knows_less_than_the_log(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        fill(stream.producer("p"), 0, 600)
        table = path / "streams" / "s" / "00000" / "sequences"
        with stream._log(0).maintaining:
            end = sequences.sealed_end(stream._log(0))
            sequences._save(stream._log(0), _native.Sequences(), end)
    (problem,) = inspect.verify(path).problems
    assert problem.kind == "sequences" and "producer 1" in problem.expected
    table.unlink()
    (problem,) = inspect.verify(path).problems
    assert problem.found == "none"


def test_retention_by_background_rules_keeps_resends_known(store):
    stream = store.stream("s", segment_bytes=1 << 16, retention=Retention(records=100))
    producer = stream.producer("p")
    fill(producer, 0, 2000)
    stream.enforce_retention()
    assert stream.first_offset(0) > 1000
    assert producer.append(b"x", sequence=5) is None
    again = store.stream("s", durability="interval").producer("p")
    assert again.append(b"x", sequence=5) is None and again.last_sequence == 1999


@pytest.mark.parametrize("how", ["flipped", "cut off"])
@pytest.mark.parametrize("saved", [False, True])
def test_the_number_of_a_damaged_last_entry_is_not_given_again(tmp_path, how, saved):
    """It looks like an entry that was never whole, but records of the log are of that number."""
    path = tmp_path / "s"
    with millstream.open(path) as store:
        stream = store.stream("s", partitions=3, segment_bytes=1 << 16)
        for name in ("first", "last"):
            stream.producer(name).append(b"x", sequence=7, partition=1)
        if saved:  # and the header of the batch is gone
            for _ in range(4):
                stream.append(b"v" * 40_000, partition=1)
            assert stream.delete_before(millstream.Position(1, 1, stream.next_offset(1) - 1)) > 2
    ids = path / "streams" / "s" / "producers"
    whole = ids.read_bytes()
    ids.write_bytes(whole[:-24] if how == "cut off" else whole[:-3] + b"?" + whole[-2:])
    damaged = ids.read_bytes()
    assert not inspect.verify(path).ok
    with millstream.open(path) as store:
        stream = store.stream("s")
        for name in ("other", "last"):
            with pytest.raises(CorruptBatch, match="producers.*restore") as caught:
                stream.producer(name)
            assert caught.value.path.endswith("producers")
        assert stream.producer("first").append(b"again", sequence=7, partition=1) is None
        stream.append(b"plain", partition=1)
    assert ids.read_bytes() == damaged
    ids.write_bytes(whole)
    with millstream.open(path) as store:
        stream = store.stream("s")
        assert stream.producer("last").append(b"again", sequence=7, partition=1) is None
        assert stream.producer("other")._number == 3
