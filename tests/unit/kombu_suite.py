"""kombu's own integration cases over our transport, by hand: they are in its sdist alone.

``KOMBU_SDIST=kombu-5.7.0 python -m pytest tests/unit/kombu_suite.py`` with the unpacked sdist. What
they check is in `test_contrib_kombu.py` as well, which needs no sdist.
"""

import os
import sys

import kombu
import pytest

import millstream.contrib.kombu  # noqa: F401, names the address

sys.path.insert(0, os.environ["KOMBU_SDIST"])

from t.integration import common


@pytest.fixture
def connection(tmp_path):
    with kombu.Connection(f"millstream://{tmp_path}/store") as opened:
        yield opened


@pytest.fixture
def invalid_connection(tmp_path):
    (tmp_path / "file").write_text("no directory")
    return kombu.Connection(f"millstream://{tmp_path}/file/store")


class TestBasicFunctionality(common.BasicFunctionality):
    pass


class TestExchangeTypes(common.BaseExchangeTypes):
    pass


class TestTimeToLive(common.BaseTimeToLive):
    pass


class TestPriority(common.BasePriority):
    pass


class TestMessage(common.BaseMessage):
    pass


class TestEventLoop(common.BaseEventLoop):
    pass
