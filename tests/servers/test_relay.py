"""A relay loses nothing and doubles nothing, whoever is killed; and says why it cannot begin.

MILLSTREAM_FULL=1: 200 kills and 20 restarts of the server, as in the files of the other servers.
"""

import contextlib
import multiprocessing
import os
import random
import threading
import time

import pytest
import relay_storm
from nats_server import NatsServer, free_port

import millstream
from millstream.store import relay as relay_module
from millstream.testing import clock

pytestmark = pytest.mark.usefixtures("nats_server")
SEED = 20261130
FULL = bool(os.environ.get("MILLSTREAM_FULL"))


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store") as made:
        yield made


@pytest.fixture
def far(address):
    with millstream.open(address) as made:
        yield made
        for name in made.streams():
            made.drop_stream(name)
        for name in made.queues():
            made.drop_queue(name)


def wait_for(seen):
    """Return once something is seen; a minute at most."""
    end, waiting = time.monotonic() + 60, threading.Event()
    while not seen():
        assert time.monotonic() < end
        waiting.wait(0.01)


def content(stream):
    """(value, key, headers, timestamp) of each record, by partition."""
    found = [[] for _ in range(stream.partitions)]
    for batch in stream.read():
        found[batch.partition] += zip(
            batch.values, batch.keys, list(batch.headers), batch.timestamps.tolist(), strict=True
        )
    return found


def fill(stream, count, begin=0):
    for number in range(begin, begin + count):
        stream.append(
            b"%d" % number if number % 7 else None,
            key=b"k%d" % (number % 13),
            headers={"n": b"%d" % number} if number % 3 else None,
        )


def test_what_is_appended_arrives_as_it_was(store, far, address):
    stream = store.stream("orders", partitions=3)
    fill(stream, 300)
    with store.relay(stream, to=address) as relay:
        assert relay.lag == 300
        assert relay.run(timeout=0.1) == 300
        assert relay.lag == 0
        assert content(far.stream("orders")) == content(stream)
        fill(stream, 50, 300)
        relay.start()
        wait_for(lambda: relay.lag == 0)
        relay.stop()
    assert content(far.stream("orders")) == content(stream)
    assert stream.group(relay.group).lag() == 0


def test_two_relays_share_the_partitions(store, far, address):
    stream = store.stream("shared", partitions=4)
    with store.relay(stream, to=address) as one, store.relay(stream, to=address) as other:
        one.start()
        other.start()
        fill(stream, 400)
        wait_for(lambda: one.lag == 0)
        one.stop()
        other.stop()
        assert one.sent + other.sent >= 400
    assert content(far.stream("shared")) == content(stream)


def test_a_position_that_is_lost_here_doubles_nothing(store, far, address):
    stream = store.stream("again")
    fill(stream, 100)
    with store.relay(stream, to=address) as relay:
        relay.run(timeout=0.1)
    stream.group(relay.group).seek("earliest")
    fill(stream, 10, 100)
    with store.relay(stream, to=address) as relay:
        assert relay.run(timeout=0.1) == 110
    assert content(far.stream("again")) == content(stream)


def test_a_queue_is_sent_and_acknowledged(store, far, address):
    queue = store.queue("mail")
    queue.put_many([b"a", b"b"])
    queue.put(b"c", key=b"k", headers={"h": b"1"})
    with store.relay(queue, to=address, topic="post") as relay:
        assert relay.run(timeout=0.1) == 3
    assert len(queue) == 0
    there = far.queue("post")
    found = [there.get(timeout=10) for _ in range(3)]
    assert [one.value for one in found] == [b"a", b"b", b"c"]
    assert (found[2].key, found[2].headers) == (b"k", {"h": b"1"})


@pytest.mark.parametrize("answer", ["taken", "refused"])
def test_a_lease_that_ends_while_the_target_answers_ends_no_relay(store, tmp_path, answer):
    queue = store.queue("mail", lease=30)
    queue.put_many([b"slow", b"quick"])
    far = str(tmp_path / "far")
    with clock() as virtual, store.relay(queue, to=far) as relay:
        put, slow = relay._into.put, [60]

        def late(*arguments, **options):
            if slow:
                virtual.advance(slow.pop())
                if answer == "refused":
                    raise millstream.WaitTimeout("no answer")
            return put(*arguments, **options)

        relay._into.put = late
        relay.run(timeout=0)
        assert len(queue) == 0
        assert {message.value for message in relay._into.peek(5)} == {b"slow", b"quick"}


def test_a_target_that_is_away_makes_the_lag_grow_and_nothing_else(store, tmp_path):
    with NatsServer(tmp_path / "nats") as server:
        stream = store.stream("away")
        with store.relay(stream, to=server.address) as relay:
            relay._target.connection.timeout = 0.5
            relay.start()
            fill(stream, 20)
            server.kill()
            fill(stream, 20, 20)
            wait_for(lambda: relay.error)
            assert relay.lag
            server.start()
            wait_for(lambda: relay.lag == 0)
            assert relay.error == ""
        with millstream.open(server.address) as far:
            assert content(far.stream("away")) == content(stream)


def test_a_relay_that_cannot_begin_says_why(store, far, address):
    stream = store.stream("s", partitions=2)
    far.stream("s", partitions=3)
    with pytest.raises(millstream.ConfigMismatch, match="partitions"):
        store.relay(stream, to=address)
    far.stream("short", partitions=2, retention=millstream.Retention(age=60))
    with pytest.raises(millstream.ConfigMismatch, match="retention"):
        store.relay(stream, to=address, topic="short")
    with pytest.raises(millstream.InvalidType):
        store.relay(b"s", to=address)
    with pytest.raises(millstream.StorageError, match="is the server running"):
        store.relay(stream, to=f"nats://127.0.0.1:{free_port()}")
    stream.append_many([b"x"] * 3, partition=0)
    with store.relay(stream, to=address, topic="t") as relay:
        relay.run(timeout=0.1)
        relay._producer.append_many([b"y"], sequences=[7], partition=1)
    with pytest.raises(millstream.ConfigMismatch, match="backup"):
        store.relay(stream, to=address, topic="t")


def test_a_record_that_the_target_does_not_take_stays_here(store, far, address):
    stream = store.stream("large")
    stream.append(b"x" * (2 << 20))
    with (
        store.relay(stream, to=address) as relay,
        pytest.raises(millstream.LimitExceeded, match="max_payload"),
    ):
        relay.run(timeout=0.1)
    assert relay.lag == 1


def test_nothing_is_lost_or_doubled_over_kills(tmp_path):
    kills, restarts = (200, 20) if FULL else (8, 2)
    chance = random.Random(SEED)
    folder = tmp_path / "store"
    with NatsServer(tmp_path / "nats") as server, millstream.open(folder) as store:
        stream = store.stream("storm", partitions=2)
        killed = ended = restarted = 0
        number = 0
        while killed < kills or restarted < restarts:
            fill(stream, 60, number)
            number += 60
            process = relaying(folder, server.address, chance.randrange(1, 1 << 30))
            if restarted < restarts and chance.random() < 0.3:
                server.kill()
                server.start()
                restarted += 1
            if (fate := chance.random()) < 0.5:
                process.join(fate / 4)
                process.kill()
            process.join(120)
            killed += process.exitcode != 0
            ended += process.exitcode == 0
        last = relaying(folder, server.address, 0)
        last.join(120)
        assert last.exitcode == 0
        with millstream.open(server.address) as far:
            there, here = content(far.stream("storm")), content(stream)
        print(f"{killed} kills, {ended} ends, {restarted} restarts, {number} records, seed {SEED}")
        assert sum(map(len, there)) == number
        assert there == here


def relaying(folder, address, seed):
    """A process that has begun to relay."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["relay_storm", "numpy", "pytest", "millstream.engines.kafka.store"]
    )
    ours, theirs = context.Pipe(duplex=False)
    arguments = theirs, str(folder), "storm", address, seed
    process = context.Process(target=relay_storm.main, args=arguments, daemon=True)
    process.start()
    theirs.close()
    with ours, contextlib.suppress(EOFError):  # it has killed itself
        ours.recv()
    return process


def test_batches_of_a_relay_are_what_one_atomic_batch_takes():
    from millstream.engines.nats.capabilities import BATCH_MOST

    assert relay_module.RECORDS <= BATCH_MOST
