"""Type checkers see the installed package as its users have it: `py.typed`, the stub, and usage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import millstream

pytest.importorskip("mypy")
pytest.importorskip("numpy")

USAGE = Path(__file__).parent.parent / "typing" / "usage.py"
PACKAGES = Path(millstream.__file__).parent.parent


def check(path: Path, scratch: Path) -> str:
    """Run mypy without our settings; an empty answer: nothing is wrong."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    command += [f"--cache-dir={scratch / 'cache'}", str(path)]
    # mypy finds installed packages by itself, and refuses their directory as a path.
    built_in_place = PACKAGES.name not in ("site-packages", "dist-packages")
    env = {**os.environ, "MYPYPATH": str(PACKAGES) if built_in_place else ""}
    done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_usage_has_the_types_it_asserts(tmp_path):
    assert check(USAGE, tmp_path) == ""


def test_a_wrong_type_is_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import millstream\nmillstream.Position(0, 1, 2).offset.upper()\n")
    assert '"int" has no attribute "upper"' in check(wrong, tmp_path)


def test_every_public_name_is_typed(tmp_path):
    names = [name for name in millstream.__all__ if name not in ("Durability", "__version__")]
    lines = [f"x_{name} = millstream.{name}\nreveal_type(x_{name})" for name in names]
    path = tmp_path / "names.py"
    path.write_text("import millstream\n" + "\n".join(lines) + "\n")
    revealed = check(path, tmp_path).splitlines()
    assert len(revealed) == len(names)
    assert not [line for line in revealed if ": error:" in line or '"Any"' in line]
