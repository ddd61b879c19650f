"""The cases of every engine, over a real RabbitMQ server; and what is RabbitMQ's own."""

import random

import pytest
from test_nats import wait_for
from test_relay import FULL, SEED, content, fill, relaying

import millstream

pytest.importorskip("pika", reason="pip install 'millstream[rabbitmq]'")
from millstream.engines.rabbitmq import store as store_module
from millstream.engines.rabbitmq import table as table_module
from millstream.testing.conformance import QueueCases, StreamCases

pytestmark = pytest.mark.usefixtures("rabbitmq_server")


@pytest.fixture(scope="session")
def address(rabbitmq_server):
    return rabbitmq_server.address


@pytest.fixture(autouse=True)
def _no_server_dies(request, monkeypatch):
    """Nothing waits for what only a death of the server needs."""
    if "killed" not in request.node.name:
        monkeypatch.setattr(store_module, "SETTLE_SECONDS", 0.0)


class Counted:
    def sent(self, store):
        amqp, wire = store.native, store.connection._wire
        return amqp.bytes_sent if wire is None else (amqp.bytes_sent, id(wire))


class TestStreams(Counted, StreamCases):
    @pytest.mark.parametrize("level", ["process", "interval", "sync"])
    def test_durability_is_given_or_refused(self, store, name, level):
        """Only queues are synced, which the capability says in its note."""
        if level == "process":
            super().test_durability_is_given_or_refused(store, name, level)
            return
        with pytest.raises(millstream.Unsupported, match="never syncs a stream"):
            store.stream(name, durability=level)
        assert name not in store.streams()


class TestQueues(Counted, QueueCases):
    @pytest.fixture(autouse=True)
    def _where(self, address):
        self.place = address

    def address_of(self, store):
        return self.place

    def restart(self, request):
        server = request.getfixturevalue("rabbitmq_server")
        server.kill()
        server.start()


@pytest.fixture
def store(address):
    with millstream.open(address) as made:
        yield made
        for name in made.streams():
            made.drop_stream(name)
        for name in made.queues():
            made.drop_queue(name)


# --- what only RabbitMQ has -----------------------------------------------------------------------


def test_a_stream_is_never_synced_and_a_queue_always_is(store):
    store.require("durability.sync", "queue.release", "stream.producer")
    assert store.queue("synced", durability="sync").durability == "sync"
    stream = store.stream("unsynced")
    for call in (
        lambda: stream.append(b"x", durability="sync"),
        lambda: store.stream("unsynced", durability="interval"),
    ):
        with pytest.raises(millstream.Unsupported, match="never syncs a stream"):
            call()
    assert stream.next_offset(0) == 0


def test_another_setting_than_stored_is_refused(store):
    store.stream("set", partitions=2)
    with pytest.raises(millstream.ConfigMismatch, match="partitions 2, not 3"):
        store.stream("set", partitions=3)
    assert store.stream("set", partitions=3, on_mismatch="keep").partitions == 2
    store.queue("set", lease=5.0)
    with pytest.raises(millstream.ConfigMismatch, match=r"lease 5\.0, not 6"):
        store.queue("set", lease=6.0)
    for call in (store.stream, store.queue):
        with pytest.raises(millstream.NotFound):
            call("none", create=False)


def test_members_share_the_partitions_and_hand_them_over(store):
    stream = store.stream("shared", partitions=4)
    first, second = stream.consumer("g"), stream.consumer("g")
    shares = wait_for(
        lambda: (first.poll(0), second.poll(0), first.assignment, second.assignment)[2:],
        lambda shares: len(shares[0]) == len(shares[1]) == 2,
    )
    assert sorted(shares[0] + shares[1]) == [0, 1, 2, 3]
    first.close()
    wait_for(lambda: (second.poll(0), second.assignment)[1], lambda found: len(found) == 4)
    second.close()


def test_a_table_goes_on_behind_a_snapshot(store, monkeypatch):
    monkeypatch.setattr(table_module, "SNAPSHOT_RECORDS", 5)
    connection = store.connection
    table = table_module.Table(connection, "millstream.test")
    connection.call(table.make())
    try:
        versions = [connection.call(table.store("k", number, None)) for number in range(12)]
        with pytest.raises(table_module.Conflict):
            connection.call(table.store("k", 99, versions[-2]))
        late = table_module.Table(connection, "millstream.test")
        late._next = 8  # as if the server had removed what is before
        connection.call(late.refresh())
        assert (late.content, late.version) == ({"k": 11}, {"k": versions[-1]})
    finally:

        async def remove():
            await (await connection.wire()).delete_stream("millstream.test")

        connection.call(remove())


# --- a relay --------------------------------------------------------------------------------------


def test_a_relay_loses_and_doubles_nothing_over_kills(tmp_path, store, address):
    kills = 200 if FULL else 4
    chance = random.Random(SEED)
    with millstream.open(tmp_path / "store") as here:
        stream, killed, number = here.stream("storm", partitions=2), 0, 0
        while killed < kills:
            fill(stream, 60, number)
            number += 60
            process = relaying(tmp_path / "store", address, chance.randrange(1, 1 << 30))
            if (fate := chance.random()) < 0.5:
                process.join(fate / 4)
                process.kill()
            process.join(120)
            killed += process.exitcode != 0
        last = relaying(tmp_path / "store", address, 0)
        last.join(120)
        assert last.exitcode == 0
        print(f"{killed} kills, {number} records, seed {SEED}")
        assert content(store.stream("storm")) == content(stream)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "a b", "", "ä", "x" * 129])
def test_a_name_that_the_engine_does_not_take(store, name):
    for call in (store.stream, store.queue):
        with pytest.raises(millstream.InvalidArgument, match="takes 1 to 128 characters"):
            call(name)
