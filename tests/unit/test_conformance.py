"""The cases that every engine is held to, over a store in a directory."""

import pytest

import millstream
from millstream.testing import conformance
from millstream.testing.conformance import QueueCases, StreamCases


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    return f"file://{tmp_path_factory.mktemp('engine') / 'store'}"


class TestStreams(StreamCases):
    pass


class TestQueues(QueueCases):
    pass


def test_every_capability_has_a_call_or_a_case_that_needs_it():
    calls = {
        **conformance.TO_STREAM, **conformance.TO_QUEUE, **conformance.TO_MESSAGE,
        **conformance.TO_STORE,
    }  # fmt: skip
    cases = {
        name
        for kind in (StreamCases, QueueCases)
        for case in vars(kind).values()
        for mark in getattr(case, "pytestmark", ())
        if mark.name == "capability"
        for name in mark.args
    }
    missing = set(conformance.NAMES) - cases - set(calls)
    # Of a store in a directory alone so far, and seen in its own tests.
    assert missing == {"queue.transaction"}


def test_an_engine_that_says_none_and_does_it_all_the_same_is_found(pytester_of):
    done = pytester_of("queue.delay", "none")
    assert "DID NOT RAISE" in done


@pytest.fixture
def pytester_of(tmp_path):
    """Run the cases of one capability over a directory whose engine says something wrong."""
    import subprocess
    import sys

    def run(name, level):
        (tmp_path / "conftest.py").write_text(
            'pytest_plugins = ["millstream.testing.conformance"]\n'
        )
        (tmp_path / "test_liar.py").write_text(
            "from millstream.capabilities import Capability\n"
            "from millstream.store.capabilities import FILE\n"
            "from millstream.testing.conformance import QueueCases\n"
            f"FILE._known[{name!r}] = Capability({level!r}, 'so it says')\n"
            f"class TestQueues(QueueCases):\n    address = 'file://{tmp_path}/store'\n"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "--rootdir", tmp_path, "-k", name, tmp_path / "test_liar.py"]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout

    return run


def test_the_mark_is_known(pytestconfig):
    assert any("capability(" in line for line in pytestconfig.getini("markers"))
    assert millstream.__version__
