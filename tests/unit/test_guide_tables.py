"""The tables of the guide are those of the code; which commands write is found by running them."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import guide_tables
from guide_tables import GUIDE, ITS_OWN, PAGES, WRITES, filled
from test_cli_walk import COMMANDS, GO_ON, UNWALKED, VALID, no_stdin, path, run  # noqa: F401
from test_cli_walk import filled as arguments_of

from millstream import errors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_what_the_code_says(page):
    text = page.read_text()
    assert filled(text) == text, "run `python tests/guide_tables.py`"
    assert "<!-- end -->" in text


def test_the_page_of_the_installation_names_every_extra():
    project = tomllib.loads((GUIDE.parents[1] / "pyproject.toml").read_text())["project"]
    text = (GUIDE / "install.md").read_text()
    extras = set(project["optional-dependencies"]) - {"dev", "test"}
    assert {name for name in extras if f"'.[{name}]'" not in text} == set()


def test_every_error_is_in_the_tree_and_in_the_table():
    text = (GUIDE / "errors.md").read_text()
    tree, table = text.split("## What to do")
    for name in errors.__all__:
        assert re.search(rf"^[│ ├└─]*{name}\b", tree, re.MULTILINE), name
        assert name == "MillstreamError" or f"\n| `{name}` |" in table, name


def test_every_command_is_in_the_table():
    text = (GUIDE / "operations.md").read_text()
    for words in COMMANDS:
        assert re.search(rf"\n\| `{words}\b", text), words
    assert COMMANDS.keys() >= WRITES | ITS_OWN


def state(store):
    """All files of a store, how large they are and when they were last written."""
    return {
        str(one.relative_to(store)): (one.stat().st_mtime_ns, one.stat().st_size)
        for one in store.rglob("*")
        if one.is_file()
    }


@pytest.mark.parametrize("words", sorted(VALID.keys() - ITS_OWN - UNWALKED - GO_ON))
def test_the_table_says_which_commands_write(path, capfd, words):  # noqa: F811
    if words == "repair":
        pytest.skip("writes where there is something to repair")
    before = state(path)
    run(capfd, arguments_of(words, path), 0)
    assert (state(path) != before) == (words in WRITES)


def test_the_walk_runs_what_the_table_lists():
    assert dict(guide_tables.commands(guide_tables.build_parser())).keys() == COMMANDS.keys()
