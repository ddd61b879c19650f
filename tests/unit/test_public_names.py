"""Every name that is documented is there after `import millstream`, and nothing else is shown."""

import ast
import pydoc
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

import millstream

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(millstream.__file__).parent
NAME = re.compile(r"(?<![\w./@-])millstream((?:\.[A-Za-z_]\w*)+)")
IMPORTED = re.compile(r"^\s*(?:>>> |\.\.\. )?(?:from|import) .*$", re.M)
FILES = {"py", "pyx", "md", "toml", "yml", "service"}
"""What ends a file's name, as in ``millstream.service``."""


def mentioned(text):
    """Dotted names behind `millstream.`, but for statements that import them."""
    found = NAME.findall(IMPORTED.sub("", text))
    return {name[1:] for name in found if name.rpartition(".")[2] not in FILES}


def docstrings():
    """All docstrings of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield path.relative_to(PACKAGE), text
    for path in sorted(PACKAGE.rglob("*.pxi")):
        for text in re.findall(r'"""(.*?)"""', path.read_text(), re.S):
            yield path.relative_to(PACKAGE), text


def all_mentioned():
    found = {}
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for where, text in [(path.name, path.read_text()) for path in pages] + list(docstrings()):
        for name in mentioned(text):
            found.setdefault(name, str(where))
    return found


def python(program):
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_is_mentioned_is_there_after_importing_the_package():
    # Drop-ins and engines are imported by whoever names them: what they need may not be here.
    names = {
        name: page
        for name, page in all_mentioned().items()
        if name.partition(".")[0] not in ("contrib", "engines") and name != "testing.conformance"
    }
    assert {"open", "Put", "codecs.json", "testing", "compat", "Worker"} <= set(names)
    program = f"""
        import millstream
        for name in {sorted(names)!r}:
            found = millstream
            for part in name.split("."):
                found = getattr(found, part, None)
                if found is None:
                    print(name)
    """
    missing = python(program).split()
    assert not {name: names[name] for name in missing}


def test_drop_ins_that_are_mentioned_are_there():
    names = {name.split(".")[1] for name in all_mentioned() if name.startswith("contrib.")}
    assert {"huey", "logging"} <= names
    for name in names:
        assert find_spec(f"millstream.contrib.{name}") is not None


def test_names_are_found_in_text():
    text = "`millstream.codecs.json`, >>> millstream.open\nimport millstream.x\n"
    text += "from millstream.y import z"
    assert mentioned(text) == {"codecs.json", "open"}
    assert mentioned("src/millstream.py millstream.service docs/millstream.md") == set()


@pytest.mark.parametrize(
    "expression",
    ["codecs.json", "testing.clock", "compat.Queue", "worker.Worker", "Worker", "inspect.verify"],
)
def test_modules_come_when_they_are_asked_for(expression):
    module = expression.split(".")[0].replace("Worker", "worker")
    program = f"""
        import sys, millstream
        assert "millstream.{module}" not in sys.modules
        millstream.{expression}
    """
    python(program)


def test_dir_shows_what_is_public_and_nothing_else():
    show = "print(*dir(millstream))"
    program = f"import millstream; {show}; import millstream.queues.queue; {show}"
    first, second = python(program).splitlines()
    assert first == second
    assert sorted(first.split()) == sorted(millstream.__all__) == sorted(set(millstream.__all__))


def test_all_that_is_public_is_there():
    for name in millstream.__all__:
        assert getattr(millstream, name) is getattr(millstream, name)
    with pytest.raises(AttributeError, match="'millstream' has no attribute 'nothing'"):
        _ = millstream.nothing


def test_help_begins_with_what_a_newcomer_needs():
    text = pydoc.plain(pydoc.render_doc(millstream))
    first, _, rest = text.partition("\n\n")
    assert first.startswith("Python Library Documentation: package millstream")
    begin = rest[:3000]
    for word in ("millstream.temporary()", 'open("data")', ".append(", ".put(", "transaction()"):
        assert word in begin
    for name in ("Store", "Stream", "Queue", "Worker", "MillstreamError"):
        assert f"`{name}`" in begin
        assert f"class {name}" in text
