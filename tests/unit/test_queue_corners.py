"""Queues where two of their parts meet: long messages and looking, lives and leases, keys and months."""

import pytest

import millstream
from millstream import RetryPolicy
from millstream.testing import clock

DAY = 86400


@pytest.fixture
def time():
    with clock() as virtual:
        yield virtual


@pytest.fixture
def store(time, tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def test_long_messages_can_be_looked_at(store):
    """`peek` and the list of dead letters raised AttributeError for what lies in blocks."""
    q = store.queue("q")
    q.put(b"long" * 5000, key=b"k", headers={"h": b"v"})
    (found,) = q.peek(1)
    assert (found.value, found.key, found.headers) == (b"long" * 5000, b"k", {"h": b"v"})
    q.get(timeout=0).reject("no")
    (letter,) = q.dead.list()
    assert letter.value == q.dead.peek(letter.id).value == b"long" * 5000
