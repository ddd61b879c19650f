"""The cases of every engine, over a real Kafka; and what is Kafka's own."""

import pytest

from millstream.testing.conformance import QueueCases, StreamCases

pytestmark = pytest.mark.usefixtures("kafka_server")


@pytest.fixture(scope="session")
def address(kafka_server):
    return kafka_server.address


class TestStreams(StreamCases):
    pass


class TestQueues(QueueCases):
    pass
