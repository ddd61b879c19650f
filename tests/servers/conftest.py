"""One server of each kind for a session; a test that kills one has its own."""

import pytest
from kafka_server import KafkaServer
from nats_server import NatsServer
from rabbitmq_server import RabbitServer
from tls_certificates import make_certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with an authority of its own, and what it has signed for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory):
    pytest.importorskip("nats", reason="pip install 'millstream[nats]'")
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory, certificates):
    pytest.importorskip("confluent_kafka", reason="pip install 'millstream[kafka]'")
    with KafkaServer(tmp_path_factory.mktemp("kafka"), certificates=certificates) as server:
        server.certificates = certificates
        yield server


@pytest.fixture(scope="session")
def address(nats_server):
    return nats_server.address


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory, certificates):
    for name in ("pika", "rstream"):
        pytest.importorskip(name, reason="pip install 'millstream[rabbitmq]'")
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq"), tls=certificates) as server:
        yield server


@pytest.fixture(autouse=True)
def _server_runs(request):
    """After a test that failed what it started is ended, the server as well."""
    for name in {"kafka_server", "nats_server", "rabbitmq_server"} & set(request.fixturenames):
        request.getfixturevalue(name).revive()
