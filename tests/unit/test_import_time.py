"""`import millstream` costs little: command lines and short-lived workers import it too."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

LIMIT_US = 15_000
HEAVY = ("numpy", "xxhash", "asyncio", "multiprocessing", "dataclasses", "inspect", "logging",
         "json", "tempfile", "subprocess", "argparse", "pyarrow", "pathlib", "typing", "re",
         "enum", "datetime")  # fmt: skip


def python(tmp_path, *arguments):
    """Run an interpreter that keeps compiled modules, as an installed package has them."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Not ours: coverage and the like hook into every interpreter from a .pth file.
    environment = {name: v for name, v in environment.items() if not name.startswith("COV_")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


def test_import_takes_at_most_15_ms(tmp_path):
    """The modules that a bare interpreter does not have, by the interpreter's own account."""
    least = LIMIT_US * 100
    for _ in range(40):
        report = python(tmp_path, "-X", "importtime", "-c", "import millstream").stderr
        [took] = re.findall(r"\| +(\d+) \| millstream$", report, re.M)
        least = min(least, int(took))
        if least <= LIMIT_US:
            break
    assert least <= LIMIT_US, report


@pytest.mark.parametrize("name", HEAVY)
def test_import_does_not_import(tmp_path, name):
    program = "import sys; import millstream; print(*sys.modules, sep='\\n')"
    bare = python(tmp_path, "-c", "import sys; print(*sys.modules, sep='\\n')").stdout.split("\n")
    if name in bare:
        pytest.skip(f"{name} is part of this interpreter's start")
    assert name not in python(tmp_path, "-c", program).stdout.split("\n")


def test_what_is_imported_late_is_there_when_asked_for(tmp_path):
    program = (
        "import millstream; assert millstream.Durability.__args__[0] == 'process';"
        "millstream.inspect.verify; millstream.StreamStats;"
        "millstream.PartitionStats; [getattr(millstream, name) for name in millstream.__all__]"
    )
    python(tmp_path, "-c", program)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        python(tmp_path, "-c", "import millstream; millstream.nothing")
    assert "has no attribute 'nothing'" in caught.value.stderr


def test_background_thread_imports_nothing(tmp_path):
    """A process that was forked meanwhile waited for ever for the lock of that import."""
    program = textwrap.dedent("""
        import sys, threading, millstream
        from millstream.background import Background
        found, looked = [], threading.Event()
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if threading.current_thread() is not threading.main_thread():
                    found.append(name)
        sys.meta_path.insert(0, Finder())
        look_after = Background._look_after_growth
        def looked_after(log):
            look_after(log)
            looked.set()
        Background._look_after_growth = staticmethod(looked_after)
        with millstream.open(sys.argv[1]) as store:
            store.stream("s").append(b"x")
            assert looked.wait(30)
        print(found)
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
