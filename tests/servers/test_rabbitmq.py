"""The cases of every engine, over a real RabbitMQ server; and what is RabbitMQ's own."""

import pytest

import millstream
from millstream.engines.rabbitmq import store as store_module
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
    pass


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
