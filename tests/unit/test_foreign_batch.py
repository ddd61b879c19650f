"""Batches of records that lie in no segment are as those of a stream."""

import gc

import numpy as np
import pytest

import millstream
from millstream import _native
from millstream._native import batch_of

VALUES = [b"a", None, b"", b"\x00\xff" * 3000]
KEYS = [b"k", None, b"", b"z"]
HEADERS = [{"h": b"1", "ä": b""}, None, {}, {"t": b"2"}]


def columns(batch):
    return (
        list(batch.values), list(batch.keys), list(batch.headers), batch.offsets.tolist(),
        batch.timestamps.tolist(),
    )  # fmt: skip


def test_it_has_the_columns_that_a_stored_one_has():
    times = np.array([5, 3, 9, 9], "<i8")
    made = batch_of(0, 1, 0, VALUES, keys=KEYS, headers=HEADERS, timestamps=times)
    with millstream.temporary() as store:
        stream = store.stream("s")
        stream.append_many(VALUES, keys=KEYS, headers=HEADERS, timestamps=times.tolist())
        [stored] = stream.read()
        assert columns(made) == columns(stored)
        assert len(made) == made.next_offset == 4
        assert made.nbytes == stored.nbytes


def test_offsets_may_have_holes():
    offsets = np.array([3, 4, 900], "<i8")
    batch = batch_of(7, 1, 3, [b"a", b"b", b"c"], timestamps=11, offsets=offsets)
    del offsets
    gc.collect()
    assert (batch.partition, batch.first_offset, batch.next_offset) == (7, 3, 901)
    assert batch.offsets.tolist() == [3, 4, 900]
    part = batch[1:]
    del batch
    gc.collect()
    assert (part.first_offset, part.next_offset, list(part.values)) == (4, 901, [b"b", b"c"])
    assert part.timestamps.tolist() == [11, 11]
    [first, second] = _native.records_of(part)
    assert (first.offset, second.offset) == (4, 900)


def test_it_is_arrow_as_well():
    pyarrow = pytest.importorskip("pyarrow")
    batch = batch_of(1, 1, 40, VALUES, keys=KEYS, timestamps=np.arange(4))
    table = pyarrow.Table.from_batches([batch.to_arrow()])
    assert table["offset"].to_pylist() == [40, 41, 42, 43]
    assert table["value"].to_pylist() == VALUES
    del batch
    gc.collect()
    assert table["key"].to_pylist() == KEYS


@pytest.mark.parametrize("given", [
    {"values": []}, {"values": [b"a"], "keys": []}, {"values": [b"a"], "timestamps": b"1234"},
    {"values": [b"a"], "offsets": b"12345678" * 2},
])  # fmt: skip
def test_columns_of_other_lengths_are_refused(given):
    with pytest.raises(millstream.InvalidArgument):
        batch_of(0, 1, 0, given.pop("values"), **given)
