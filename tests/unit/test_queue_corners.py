"""Where two parts of a queue meet: long messages and looking, lives and leases, keys and months."""

import pytest
from open_copy import copy_open

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
    q._upkeep()
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
        q._upkeep()
    assert (len(q), q.stats().expired) == (0, 1)


def test_delay_of_more_than_a_month_is_kept_behind_another_of_its_key(store, time):
    """A tick reaches thirty days: who waited for longer behind its key was let go early."""
    q = store.queue("q", ordering="key", lease=30 * DAY)
    q.put(b"first", key=b"k")
    q.put(b"second", key=b"k", delay=40 * DAY)
    m = q.get(timeout=0)
    for _ in range(7):
        time.advance(5 * DAY)
        q._upkeep()
        m.extend(30 * DAY)
    m.ack()
    assert q.get_many(1, timeout=0) == []
    time.advance(6 * DAY)
    assert q.get(timeout=0).value == b"second"


def test_message_that_stood_for_months_behind_its_key_comes_at_once(store, time):
    """Ticks come round after half a year: what had waited for more than a quarter waited on."""
    q = store.queue("q", ordering="key", lease=30 * DAY)
    q.put_many([millstream.Put(b"first", key=b"k"), millstream.Put(b"second", key=b"k")])
    m = q.get(timeout=0)
    for _ in range(12):
        time.advance(10 * DAY)
        q._upkeep()
        m.extend(30 * DAY)
    m.ack()
    assert q.get(timeout=0).value == b"second"


def test_purge_takes_all_of_a_key(store):
    """The removal of the first let the next one go, which stayed."""
    q = store.queue("q", ordering="key")
    q.put_many([millstream.Put(b"%d" % i, key=b"k", delay=i % 2) for i in range(9)])
    assert q.purge() == 9
    assert len(q) == 0


def test_queue_whose_capacity_was_raised_opens_again(store, tmp_path):
    """Slots in use are a multiple of 1,024 or all there are: of a raised capacity, neither."""
    for before, after in ((100, 200), (1500, 9000)):
        q = store.queue(f"q{before}", capacity=before, dead_limit=0)
        q.put_many([b"x"] * before)
        q.alter(capacity=after)
        assert len(q.put_many([b"y"] * 600)) == min(600, after - before)
    store.close()
    with millstream.open(tmp_path / "store") as again:
        assert len(again.queue("q100").get_many(500, timeout=0)) == 200
        assert len(again.queue("q1500").get_many(5000, timeout=0)) == 2100


@pytest.mark.parametrize("how", ["all die", "alter"])
@pytest.mark.parametrize("key", [None, b"b"])
@pytest.mark.parametrize("ordering", [None, "key"])
def test_message_that_came_back_waits_behind_those_that_waited_before(
    tmp_path, store, time, ordering, key, how
):
    """In an ordered queue the older ids went first, once its hints had been made anew."""
    q = store.queue("q", lease=150, ordering=ordering, capacity=5)
    q.put(b"came back", key=b"a")
    q.get(timeout=0)
    q.put(b"waited", key=key)
    time.advance(200)
    q._upkeep()
    assert q._counts()["ready"] == 2
    if how == "alter":
        q.alter(capacity=6)
        assert [q.get(timeout=0).value for _ in range(2)] == [b"waited", b"came back"]
        return
    copy_open(store.path, tmp_path / "copy")
    with millstream.open(tmp_path / "copy") as again:
        q = again.queue("q")
        assert [q.get(timeout=0).value for _ in range(2)] == [b"waited", b"came back"]


def test_a_message_is_not_made_by_hand():
    with pytest.raises(TypeError, match=r"Queue\.get"):
        millstream.Message()
