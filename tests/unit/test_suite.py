"""The suite itself: one failure stays one failure, and what a test leaves behind is seen."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
OPENED = {
    "store": "left = millstream.temporary()",
    "reader": "left = millstream.temporary().stream('s').read(follow=True, timeout=0.1)",
    "view": "left = millstream.temporary().stream('s').view()",
    "consumer": "left = millstream.temporary().stream('s').consumer(group='g')",
    "transaction": "left = millstream.temporary().transaction().__enter__()",
    "lease": "left = millstream.temporary().queue('q'); left.put(b'x'); left = left.get()",
    "process": "left = subprocess.Popen(['sleep', '600'], stdout=subprocess.PIPE)",
    "handler": "left = signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "directory": "left = os.chdir('/')",
}


def suite(tmp_path, *tests, more=(), env=None, **options):
    """Run tests under the suite's own conftest; the last line of the report, and all of it."""
    imports = "import gc, os, signal, subprocess, sys, millstream\n"
    (tmp_path / "test_it.py").write_text(imports + "".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest",
               "-c", str(TESTS.parent / "pyproject.toml"), str(tmp_path), *more]  # fmt: skip
    env = os.environ if env is None else env
    environment = {**env, "PYTHONPATH": f"{TESTS}:{env.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
    return done.stdout.strip().split("\n")[-1], done.stdout + done.stderr


AFTER = """
def test_after_{what}(store):
    gc.collect()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert os.getcwd() != "/"
    assert len(millstream.store.store.OPEN) == 1
    store.stream("s").append(b"x")
"""
FAILS = """
def test_{what}():
    {left}
    assert left == 0
"""
PASSES = """
kept = []
def test_{what}():
    {left}
    kept.append(left)
"""


def test_one_failure_stays_one(tmp_path):
    tests = [text.format(what=what, left=left) for what, left in OPENED.items()
             for text in (FAILS, AFTER)]  # fmt: skip
    last, report = suite(tmp_path, *tests)
    assert re.match(rf"{len(OPENED)} failed, {len(OPENED)} passed in", last), report
    assert "slowest 20 durations" in report


def test_a_test_that_passes_and_leaves_something_open_fails(tmp_path):
    which = {what: OPENED[what] for what in OPENED if what != "process"}
    tests = [PASSES.format(what=what, left=left) for what, left in which.items()]
    last, report = suite(tmp_path, *tests)
    assert re.match(rf"{len(which)} passed, {len(which)} errors in", last), report
    assert len(re.findall("^left behind: open: <Store", report, re.M)) == len(which) - 2


def test_children_can_be_interrupted_wherever_the_suite_was_started(tmp_path):
    test = """
def test_child():
    code = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); os._exit(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGINT, done
"""
    last, report = suite(tmp_path, test, preexec_fn=in_the_background)
    assert re.match("1 passed", last), report


def in_the_background():
    """As a shell starts what is put in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def test_seeds_are_the_same_in_each_run(tmp_path):
    test = """
import hypothesis, hypothesis.strategies as st
seen = []
@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers())
def test_it(number):
    seen.append(number)
def test_show():
    print(seen, crash_workers.seed_of("x"))
"""
    env = {name: v for name, v in os.environ.items() if name != "MILLSTREAM_SEED"}
    path = f"import sys; sys.path.insert(0, {str(TESTS / 'crash')!r}); import crash_workers\n"
    runs = [suite(tmp_path, path, test, more=("-s",), env=env)[1] for _ in range(2)]
    shown = [re.findall(r"^\.?\[.*\] \d+$", run, re.M) for run in runs]
    assert shown[0] == shown[1] != [], runs
    again = suite(tmp_path, path, test, more=("-s",), env={**env, "MILLSTREAM_SEED": "77"})[1]
    other = re.findall(r"^\.?\[.*\] \d+$", again, re.M)
    assert other != shown[0]
    assert other[0].endswith(" 77")


@pytest.mark.parametrize("verb", ["fast", "fuzz", "cover"])
def test_a_selection_of_steps_that_matches_none_fails(verb):
    """It said "0 passed, 0 failed" and ended with 0."""
    done = subprocess.run(
        [sys.executable, TESTS / "check.py", verb, "-k", "nosuchstep"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "nosuchstep" in done.stderr


@pytest.mark.parametrize(
    ("word", "tool", "more"),
    [("harnesses", "clang", {}), ("Python", "atheris", {"MILLSTREAM_FUZZ_SECONDS": "1"})],
)
def test_fuzzing_without_its_tool_fails_and_names_it(tmp_path, word, tool, more):
    """Without clang the corpora were replayed, which was called fuzzed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, shutil\n"
        "which, find = shutil.which, importlib.util.find_spec\n"
        "shutil.which = lambda name, *rest, **more: "
        "None if name.startswith('clang') else which(name, *rest, **more)\n"
        "importlib.util.find_spec = lambda name, *rest: "
        "None if name == 'atheris' else find(name, *rest)\n"
    )
    env = {**os.environ, **more, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, TESTS / "check.py", "fuzz", "-k", word],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 1 and f"{tool} is not" in done.stdout, done.stdout + done.stderr
