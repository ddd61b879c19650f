"""What most tests start from."""

import pytest

import millstream


@pytest.fixture
def store():
    """A store of level `process`, so that no test waits for a disk it does not test."""
    with millstream.temporary(durability="process") as store:
        yield store


@pytest.fixture
def stream(store):
    return store.stream("s")
