"""`import millstream` costs little: command lines and short-lived workers import it too."""

import os
import subprocess
import sys
import textwrap

import pytest

LIMIT = 0.75  # starts of a bare interpreter: numpy takes five, asyncio three
OURS, OTHERS = 3, 13  # modules
OPENED, OTHERS_OPENED = 40, 57  # of a store that is made, to its close
HEAVY = ("functools", "threading", "queue",
         "numpy", "xxhash", "asyncio", "multiprocessing", "dataclasses", "inspect", "logging",
         "json", "tempfile", "subprocess", "argparse", "pyarrow", "pathlib", "typing", "re",
         "enum", "datetime")  # fmt: skip


def python(tmp_path, *arguments):
    """Run an interpreter that keeps compiled modules, as an installed package has them."""
    command = [sys.executable, *arguments]
    environment = environment_of(tmp_path)
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


def environment_of(tmp_path):
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Not ours: coverage and the like hook into every interpreter from a .pth file.
    return {name: v for name, v in environment.items() if not name.startswith("COV_")}


def cost(tmp_path, program):
    """Processor time of an interpreter that runs it: the same share of any machine, busy or not."""
    environment = environment_of(tmp_path)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program], environment)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_import_costs_little_more_than_a_start_of_a_bare_interpreter(tmp_path):
    """The least of several of each, since what else runs only ever adds."""
    bare, whole = [], []
    cost(tmp_path, "import millstream")  # the modules are compiled now
    for _ in range(30):
        bare.append(cost(tmp_path, "pass"))
        whole.append(cost(tmp_path, "import millstream"))
        if len(bare) >= 5 and min(whole) <= (1 + LIMIT) * min(bare):
            break
    assert min(whole) <= (1 + LIMIT) * min(bare), (min(bare), min(whole))


def test_import_loads_few_modules(tmp_path):
    """A count, which no machine makes larger. Modules of ours, and of the standard library."""
    ours, others = loaded_by(tmp_path, "import millstream")
    assert len(ours) <= OURS, sorted(ours)
    assert len(others) <= OTHERS, sorted(others)


def test_opening_loads_few_modules(tmp_path):
    """What an import leaves for later is not to be made up for then."""
    store = str(tmp_path / "s")
    ours, others = loaded_by(tmp_path, f"import millstream; millstream.open({store!r}).close()")
    assert len(ours) <= OPENED, sorted(ours)
    assert len(others) <= OTHERS_OPENED, sorted(others)


def loaded_by(tmp_path, program):
    """Modules of ours and of others that a program loads, but for those of an interpreter.

    Its `site` belongs to it: what `.pth` files of installed packages load is not the program's.
    """
    show = "import sys; print(*sys.modules)"
    bare = set(python(tmp_path, "-c", show).stdout.split())
    whole = set(python(tmp_path, "-c", f"{program}; {show}").stdout.split())
    ours = {name for name in whole if name.split(".")[0] == "millstream"}
    return ours, whole - bare - ours


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
        from millstream.store.background import Background
        found, looked = [], threading.Event()
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if threading.current_thread() is not threading.main_thread():
                    found.append(name)
        sys.meta_path.insert(0, Finder())
        check = Background._check_growth
        def checked(log):
            check(log)
            looked.set()
        Background._check_growth = staticmethod(checked)
        with millstream.open(sys.argv[1]) as store:
            store.stream("s").append(b"x")
            assert looked.wait(30)
        print(found)
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
