"""One server of each kind for a session; a test that kills one has its own."""

import pytest
from nats_server import NatsServer


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory):
    pytest.importorskip("nats", reason="pip install 'millstream[nats]'")
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def address(nats_server):
    return nats_server.address


@pytest.fixture(autouse=True)
def _server_runs(request):
    """After a test that failed what it started is ended, the server as well."""
    if "nats_server" in request.fixturenames:
        request.getfixturevalue("nats_server").revive()
