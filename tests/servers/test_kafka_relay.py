"""A relay to Kafka loses nothing and doubles nothing, whoever is killed; and says why it cannot."""

import contextlib
import multiprocessing
import random

import kafka_storm
import pytest
from test_relay import FULL, content, fill, wait_for

import millstream

pytestmark = pytest.mark.usefixtures("kafka_server")
SEED = 20261130


@pytest.fixture(scope="session")
def address(kafka_server):
    return kafka_server.address


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


def test_what_is_appended_arrives_as_it_was(store, far, address):
    stream = store.stream("orders", partitions=3)
    fill(stream, 300)
    stream.append(b"old", timestamp=1_357_000_000_000_007, partition=0)
    with store.relay(stream, to=address) as relay, store.relay(stream, to=address) as other:
        assert relay.run(timeout=0.1) == 301
        assert relay.lag == 0
        fill(stream, 100, 300)
        relay.start()
        other.start()
        wait_for(lambda: relay.lag == 0)
        relay.stop()
        other.stop()
    assert content(far.stream("orders")) == content(stream)
    stream.group(relay.group).seek("earliest")  # a position that is lost here doubles nothing
    with store.relay(stream, to=address) as relay:
        relay.run(timeout=0.1)
    assert content(far.stream("orders")) == content(stream)


def test_topics_that_would_lose_records_are_refused(store, far, address):
    stream = store.stream("s")
    makes = {
        "default": {},
        "compacted": {"cleanup.policy": "compact", "retention.ms": "-1"},
        "bounded": {"retention.ms": "-1", "retention.bytes": "1000"},
        "late": {"message.timestamp.type": "LogAppendTime"},
    }
    for name, config in makes.items():
        far.make_topic(name, 1, config)
    for name, reason in (
        ("default", "retention.ms=604800000 goes by the time that a record has itself"),
        ("compacted", "cleanup.policy=compact"),
        ("bounded", "retention.bytes=1000"),
    ):
        with pytest.raises(millstream.ConfigMismatch, match=reason):
            store.relay(stream, to=address, topic=name)
    stream.append(b"of 2013", timestamp=1_357_000_000_000_007)
    with store.relay(stream, to=address, topic="late") as relay:
        assert relay.run(timeout=0.1) == 1
    assert content(far.stream("late")) == content(stream)
    far.stream("more", partitions=2)
    with pytest.raises(millstream.ConfigMismatch, match="partitions 2, not 1"):
        store.relay(stream, to=address, topic="more")


def test_a_record_that_the_topic_does_not_take_stays_here(store, far, address):
    stream = store.stream("large")
    stream.append(b"x" * (2 << 20))
    with (
        store.relay(stream, to=address) as relay,
        pytest.raises(millstream.LimitExceeded, match=r"max\.message\.bytes"),
    ):
        relay.run(timeout=0.1)
    assert relay.lag == 1


def test_nothing_is_lost_or_doubled_over_kills(kafka_server, tmp_path):
    kills, restarts = (200, 20) if FULL else (8, 1)
    chance = random.Random(SEED)
    folder, server, steps = tmp_path / "store", kafka_server, len(kafka_storm.STEPS)
    with millstream.open(folder) as store:
        stream = store.stream("storm", partitions=2)
        killed = ended = restarted = number = rounds = 0
        by_step = dict.fromkeys([*range(steps), "random"], 0)
        while killed < kills or restarted < restarts:
            fill(stream, 60, number)
            number += 60
            step = rounds % (steps + 1) if rounds <= steps else chance.randrange(steps + 1)
            rounds += 1
            process = relaying(folder, server.address, None if step == steps else step,
                               chance.randint(1, 2))  # fmt: skip
            if restarted < restarts and chance.random() < 0.3 + (killed >= kills):
                server.kill()
                server.start()
                restarted += 1
            if step == steps:
                process.join(chance.random() / 4)
                process.kill()
            process.join(120)
            by_step["random" if step == steps else step] += process.exitcode != 0
            killed += process.exitcode != 0
            ended += process.exitcode == 0
        last = relaying(folder, server.address, None, 0)
        last.join(120)
        assert last.exitcode == 0
        with millstream.open(server.address) as far:
            there, here = content(far.stream("storm")), content(stream)
            far.drop_stream("storm")
        print(f"{killed} kills {by_step}, {ended} ends, {restarted} restarts, {number} records,"
              f" seed {SEED}")  # fmt: skip
        assert sum(map(len, there)) == number
        assert there == here


def test_a_mirror_has_what_is_there(store, far, address):
    there = far.stream("back", partitions=2)
    fill(there, 100)
    there.append(b"old", timestamp=1_357_000_000_000_007, partition=0)
    into = store.stream("local", partitions=2)
    with store.mirror(address, "back", into=into) as mirror:
        assert mirror.lag == 101
        assert mirror.run(timeout=0) == 101
        assert mirror.lag == 0
        mirror.start()
        fill(there, 20, 100)
        wait_for(lambda: mirror.received == 121)
    assert content(into) == content(there)
    with store.mirror(address, "back", into=into) as mirror:
        assert mirror.run(timeout=0) == 0
    with pytest.raises(millstream.ConfigMismatch, match="2 partitions and .* 1;"):
        store.mirror(address, "back", into=store.stream("other"))
    with pytest.raises(millstream.NotFound):
        store.mirror(address, "none", into=into)
    with pytest.raises(millstream.InvalidType):
        store.mirror(address, "back", into="local")
    there.append_many([b"x"] * 10, partition=0)
    there.delete_before(millstream.Position(0, 1, there.next_offset(0) - 5))
    with (
        store.mirror(address, "back", into=into) as mirror,
        pytest.raises(millstream.OffsetOutOfRange),
    ):
        mirror.run(timeout=0)


def test_a_mirror_that_is_killed_doubles_nothing(far, address, tmp_path):
    kills = 100 if FULL else 5
    chance, folder, steps = random.Random(SEED), tmp_path / "store", len(kafka_storm.BACK)
    there = far.stream("storm", partitions=2)
    with millstream.open(folder) as store:
        into = store.stream("storm", partitions=2)
        killed = number = 0
        while killed < kills:
            fill(there, 60, number)
            number += 60
            step = chance.randrange(steps + 1)
            process = relaying(folder, address, None if step == steps else step,
                               chance.randint(1, 2), kafka_storm.mirror)  # fmt: skip
            if step == steps:
                process.join(chance.random() / 8)
                process.kill()
            process.join(120)
            killed += process.exitcode != 0
        with store.mirror(address, "storm", into=into) as mirror:
            mirror.run(timeout=0)
        print(f"{killed} kills, {number} records, seed {SEED}")
        assert sum(map(len, content(into))) == number
        assert content(into) == content(there)


def relaying(folder, address, step, times, work=kafka_storm.main):
    """A process that has begun to relay, or to mirror."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kafka_storm", "numpy", "pytest"])
    ours, theirs = context.Pipe(duplex=False)
    arguments = theirs, str(folder), "storm", address, step, times
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    theirs.close()
    with ours, contextlib.suppress(EOFError):  # it has killed itself
        ours.recv()
    return process
