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


@pytest.mark.parametrize("how", ["lease ends", "nack", "nack later", "release", "redrive"])
def test_message_whose_time_ended_under_a_lease_expires_behind_it(store, time, how):
    """It kept its place, and was counted, until somebody came upon it."""
    q = store.queue("q", lease=150, retry=RetryPolicy(max_attempts=9))
    q.put(b"x", ttl=50)
    m = q.get(timeout=0)
    time.advance(100)
    q._look()
    if how == "lease ends":
        time.advance(100)
    elif how.startswith("nack"):
        m.nack(delay=0 if how == "nack" else 1000)
    elif how == "release":
        m.release()
    else:
        m.reject()
        q.dead.redrive()
    assert len(q) == 1
    for _ in range(2):  # a sweep that finds the lease over leaves the rest to the next
        q._look()
    assert (len(q), q.stats().expired) == (0, 1)
