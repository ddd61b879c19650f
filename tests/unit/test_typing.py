"""Type checkers see the installed package as its users have it: `py.typed`, the stub, and usage."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import millstream

pytest.importorskip("mypy")
pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parents[2]
USAGE = ROOT / "tests" / "typing" / "usage.py"
BLOCK = re.compile(r"^ *```python[^\n]*\n(.*?)^ *```", re.M | re.S)
PACKAGES = Path(millstream.__file__).parent.parent


def check(*paths: Path | str, scratch: Path, settings: str = "") -> str:
    """Run mypy without our settings; an empty answer: nothing is wrong."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    command += [
        f"--config-file={settings}",
        f"--cache-dir={scratch.parent / 'mypy-cache'}",
        *map(str, paths),
    ]
    # mypy finds installed packages by itself, and refuses their directory as a path.
    built_in_place = PACKAGES.name not in ("site-packages", "dist-packages")
    env = {**os.environ, "MYPYPATH": str(PACKAGES) if built_in_place else ""}
    done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


OPTIONAL = ("duckdb", "polars", "pyarrow")
SETTINGS = "[mypy]\n" + "".join(
    f"[mypy-{name}.*]\nignore_missing_imports = True\n" for name in OPTIONAL
)

UNTYPED = (
    "apscheduler",
    *("celery", "django", "dramatiq", "engines", "huey", "opentelemetry", "prometheus", "taskiq"),
    "torch",
)
"""Pages for the users of frameworks, which have no types: their blocks are run, not checked."""


def snippets():
    """(a name for a module, its code, where it is) of each block of README and guide."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]:
        if path.stem in UNTYPED:
            continue
        text = path.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 2
            code = textwrap.dedent(block[1])
            yield f"{path.stem}_{line}", code, f"{path.relative_to(ROOT)}:{line}"


def test_every_snippet_passes_a_strict_type_checker(tmp_path):
    """Each as it stands: what is not in it, its reader does not have either."""
    places = {}
    for name, code, where in snippets():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        places[name] = where
    assert len(places) > 50
    (tmp_path / "settings.ini").write_text(SETTINGS)
    paths = [f"{name}.py" for name in places]
    found = check(*paths, scratch=tmp_path, settings="settings.ini")
    assert re.sub(r"^(\w+)\.py:", lambda m: f"in {places[m[1]]}, line ", found, flags=re.M) == ""


def test_usage_has_the_types_it_asserts(tmp_path):
    assert check(USAGE, scratch=tmp_path) == ""


def test_a_wrong_type_is_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import millstream\nmillstream.Position(0, 1, 2).offset.upper()\n")
    assert '"int" has no attribute "upper"' in check(wrong, scratch=tmp_path)


def test_every_public_name_is_typed(tmp_path):
    names = [name for name in millstream.__all__ if name not in ("Durability", "__version__")]
    lines = [f"x_{name} = millstream.{name}\nreveal_type(x_{name})" for name in names]
    path = tmp_path / "names.py"
    path.write_text("import millstream\n" + "\n".join(lines) + "\n")
    revealed = check(path, scratch=tmp_path).splitlines()
    assert len(revealed) == len(names)
    assert not [line for line in revealed if ": error:" in line or '"Any"' in line]
