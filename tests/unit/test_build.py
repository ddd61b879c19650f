"""A build stops, and says why, where what it made could not be trusted."""

import runpy
import sys
import sysconfig
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture(scope="module")
def refuse():
    pytest.importorskip("setuptools")
    return runpy.run_path(str(SETUP), run_name="setup")["refuse_unsupported"]


def test_this_interpreter_is_supported(refuse):
    refuse()


@pytest.mark.parametrize(
    ("module", "name", "value", "said"),
    [
        (sys, "platform", "darwin", "Linux only; this is darwin"),
        (sys, "byteorder", "big", "little-endian"),
        (sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED", "free-threaded"),
    ],
)
def test_other_machines_and_free_threads_are_refused(
    monkeypatch, refuse, module, name, value, said
):
    monkeypatch.setattr(module, name, value)
    with pytest.raises(SystemExit) as stop:
        refuse()
    monkeypatch.undo()
    assert said in str(stop.value)
