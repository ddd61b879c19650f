"""`contrib.torch`: each record once, whatever workers a loader has, and where it is resumed."""

import signal

import pytest

import millstream

pytest.importorskip("torch")

from torch.utils.data import DataLoader

from millstream.contrib.torch import StreamDataset

# torch says these of itself: that it was asked for its old names, and that workers outnumber cores.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*DataLoader will create"),
]
RECORDS = 6000
PARTITIONS = 3


def number_of(value):
    """At the top of the module: a spawned worker imports it."""
    return int(value)


@pytest.fixture
def stream(store):
    stream = store.stream("samples", partitions=PARTITIONS)
    for partition in range(PARTITIONS):
        numbers = range(partition, RECORDS, PARTITIONS)
        stream.append_many([b"%d" % number for number in numbers], partition=partition)
    return stream


@pytest.fixture(autouse=True)
def own_handler():
    """A loader with workers leaves a handler of SIGCHLD behind."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture(params=["fork", "spawn"])
def context(request):
    return request.param


def loader_of(data, workers=2, context="fork", **options):
    more = {"multiprocessing_context": context} if workers else {}
    return DataLoader(data, batch_size=50, num_workers=workers, **more, **options)


def all_of(loader):
    return [number for batch in loader for number in batch.tolist()]


def test_without_workers(stream):
    data = StreamDataset(stream, transform=number_of)
    loader = loader_of(data, workers=0)
    expected = [n for p in range(PARTITIONS) for n in range(p, RECORDS, PARTITIONS)]
    assert all_of(loader) == expected
    assert all_of(loader) == expected  # a second epoch
    stream.append(b"%d" % RECORDS, partition=2)
    assert all_of(loader) == [*expected, RECORDS]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_share_the_records(stream, context, workers):
    data = StreamDataset(stream, transform=number_of)
    assert sorted(all_of(loader_of(data, workers, context))) == list(range(RECORDS))


def test_ranks_share_the_records(stream):
    found = []
    for rank in range(2):
        data = StreamDataset(stream, transform=number_of, rank=rank, world_size=2)
        share = all_of(loader_of(data, workers=0))
        assert len(share) > RECORDS / 3
        found += share
    assert sorted(found) == list(range(RECORDS))


def test_fields(stream, store):
    data = StreamDataset(store.path, "samples", fields=("partition", "offset", "value"))
    sample = next(iter(data))
    assert sample == {"partition": 0, "offset": 0, "value": b"0"}
    second = StreamDataset(stream, fields="offset", rank=1, world_size=2)
    assert next(iter(second)) == 1024
    assert set(next(iter(StreamDataset(stream, fields=("key", "headers", "timestamp"))))) == {
        *("key", "headers", "timestamp")
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [0, 1, 37, 119, 120])
def test_resumed_in_the_middle(stream, workers, after):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    context_of = {"multiprocessing_context": "fork"} if workers else {}

    def make():
        data = StreamDataset(stream, transform=number_of)
        return stateful(data, batch_size=50, num_workers=workers, **context_of)

    loader, found = make(), []
    batches = iter(loader)
    for _ in range(after):
        found += next(batches).tolist()
    state = loader.state_dict()
    del batches
    again = make()
    again.load_state_dict(state)
    found += all_of(again)
    assert sorted(found) == list(range(RECORDS))
    assert sorted(all_of(again)) == list(range(RECORDS))  # the next epoch is whole


def test_resumed_with_spawned_workers(stream):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make():
        data = StreamDataset(stream, transform=number_of)
        return stateful(data, batch_size=50, num_workers=2, multiprocessing_context="spawn")

    loader = make()
    batches = iter(loader)
    found = [number for _ in range(37) for number in next(batches).tolist()]
    state = loader.state_dict()
    del batches
    again = make()
    again.load_state_dict(state)
    assert sorted(found + all_of(again)) == list(range(RECORDS))


def test_a_state_of_something_else_is_refused(stream, store):
    data = StreamDataset(stream)
    iterator = iter(data)
    next(iterator)
    state = data.state_dict()
    iterator.close()
    with pytest.raises(millstream.InvalidArgument, match="0 of 1, this is 0 of 2"):
        StreamDataset(stream, rank=0, world_size=2).load_state_dict(state)
    other = store.stream("other", partitions=1)
    with pytest.raises(millstream.InvalidArgument, match="'samples', not 'other'"):
        StreamDataset(other).load_state_dict(state)


def test_what_retention_removed(store):
    stream = store.stream(
        "r", partitions=1, segment_bytes="64KiB", retention=millstream.Retention(records=500)
    )
    stream.append(b"1")
    data, sure = StreamDataset(stream), StreamDataset(stream, on_lost="earliest")
    for one in (data, sure):
        one.load_state_dict({**one.state_dict(), "next": {0: 0}, "ends": {0: 3000}})
    for _ in range(30):
        stream.append_many([bytes(100)] * 100)
    stream.enforce_retention()
    with pytest.raises(millstream.OffsetOutOfRange):
        list(data)
    assert len(list(sure)) == 3000 - stream.first_offset(0)


def test_bad_input(stream, store):
    with pytest.raises(millstream.InvalidArgument, match="fields"):
        StreamDataset(stream, fields="values")
    with pytest.raises(millstream.InvalidArgument, match="fields"):
        StreamDataset(stream, fields=())
    with pytest.raises(millstream.InvalidArgument, match="rank 2 of 2"):
        StreamDataset(stream, rank=2, world_size=2)
    with pytest.raises(millstream.InvalidArgument, match="not both"):
        StreamDataset(stream, "samples")
    with pytest.raises(millstream.InvalidArgument, match="name="):
        StreamDataset(store.path)
    with pytest.raises(millstream.NotFound):
        StreamDataset(store.path, "sampels")
    with pytest.raises(millstream.NotFound):
        StreamDataset(store.path + "-not-there", "samples")
