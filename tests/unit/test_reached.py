"""What `check.py cover` takes for an error path, and when its table of reasons is untrue."""

import ast
import re

import pytest
import reached
from rules import ROOT, Failed

PYTHON = """
def first(x):
    if x:
        plain()
        y = 2
        raise ValueError(
            y)
    try:
        plain()
    except OSError:
        mend()
        return 1
    return 2
"""
C = """
static ms_status first(int x) {
  if (x == 1)
    return MS_CORRUPT;
  if (x == 2) {
    int y = x;
    return ms_fail(err, MS_LIMIT, 0, 0, 0,
                   "too much");
  }
  if (x == 3)
    return MS_BUSY;
  return x == 4 ? MS_OK : MS_LOST;
}
"""


def lines_of(text, numbers):
    return [text.split("\n")[number - 1].strip() for number in sorted(numbers)]


def test_error_paths_of_python_are_raises_what_leads_to_them_and_handlers():
    found = lines_of(PYTHON, set(reached.python_errors(ast.parse(PYTHON))))
    assert found == ["plain()", "y = 2", "raise ValueError(", "y)", "mend()", "return 1"]


def test_error_paths_of_c_are_returns_of_failures():
    fails, text = reached.failures(ROOT), C.split("\n")
    found = {
        number
        for begin, line in enumerate(text, 1)
        if fails.match(line)
        for number in (*reached.block(text, begin), *reached.before(text, begin))
    }
    assert lines_of(C, found) == [
        "return MS_CORRUPT;",
        "int y = x;",
        "return ms_fail(err, MS_LIMIT, 0, 0, 0,",
        '"too much");',
        "return x == 4 ? MS_OK : MS_LOST;",
    ]


@pytest.fixture
def counted(monkeypatch):
    """One file with a line of an error path that ran, and one that did not."""
    file = reached.Counted("csrc/x.c", ["ran();", "failed();"], {1}, {2}, {1: "f", 2: "f"}, {1, 2})
    monkeypatch.setattr(reached, "python_lines", lambda copy: [])
    monkeypatch.setattr(reached, "c_lines", lambda copy: [file])
    monkeypatch.setattr(reached, "UNREACHED", {})
    monkeypatch.setattr(reached, "SOMETIMES", {})
    return file


def test_an_error_path_that_did_not_run_needs_a_reason(counted, monkeypatch, capsys):
    with pytest.raises(Failed, match=re.escape("csrc/x.c:f:failed(); (line 2) did not run")):
        reached.report(ROOT)
    monkeypatch.setattr(reached, "UNREACHED", {"cannot be": ["csrc/*.c:f:failed*"]})
    reached.report(ROOT)
    assert re.search(r"^csrc/x.c +2 +1 \| +2 +1 +1$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("entry", ["csrc/x.c:f:ran*", "csrc/x.c:gone", "csrc/y.c"])
def test_a_reason_for_what_runs_or_is_not_there_is_an_error(counted, monkeypatch, entry):
    monkeypatch.setattr(reached, "UNREACHED", {"is": ["csrc/x.c:f:failed*"], "was": [entry]})
    with pytest.raises(Failed, match="its reason can go: was"):
        reached.report(ROOT)


def test_what_runs_in_some_runs_only_may_run_but_has_to_be_there(counted, monkeypatch):
    monkeypatch.setattr(reached, "SOMETIMES", {"a race": ["csrc/x.c:f"]})
    reached.report(ROOT)
    counted.ran, counted.missed = {1, 2}, set()
    reached.report(ROOT)
    monkeypatch.setattr(reached, "SOMETIMES", {"a race": ["csrc/x.c:g"]})
    with pytest.raises(Failed, match="its reason can go: a race"):
        reached.report(ROOT)


def test_what_is_left_out_is_there():
    assert [path for path in reached.LEFT_OUT if not (ROOT / path).exists()] == []
