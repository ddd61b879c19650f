"""Every check: `python tests/check.py fast|full|compilers|asan|tsan|fuzz|cover|docs|bench|release`.

A step prints its time, then what is wrong. A step without its subject fails, as does
a missing tool. The tools come with `pip install '.[dev]'`.
"""

import argparse
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import reached
from names import names
from rules import (
    PACKAGE,
    ROOT,
    SOURCE,
    Failed,
    c_layers,
    constants,
    docs,
    fail_on,
    files,
    privates,
    python_layers,
    shell,
    sleeps,
    tidy,
    tree,
    where,
)

C_FLAGS = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-pthread"]
SHOWN = 60  # lines of one failure
SUITE = ["-m", "pytest", "-n", "auto"]  # one process for each core


@dataclass(frozen=True)
class Step:
    """One check; `alone` when it must not share the machine."""

    name: str
    run: Callable[[], None]
    alone: bool = False


# fast ---------------------------------------------------------------------------------------------


def ruff() -> None:
    """Lint and format of all Python."""
    shell("ruff", "check", "--no-cache", "--output-format=concise", ".")
    shell("ruff", "format", "--no-cache", "--check", ".")


def clang_format() -> None:
    """Format of all C."""
    paths = [path for path in files(".c", ".h") if path.parts[-2] != "golden"]
    try:
        shell("clang-format", "--dry-run", "--Werror", *paths)
    except Failed as error:
        places = Counter(re.findall(r"^(.+?):\d+:\d+: error", str(error), re.M))
        fail_on([f"{where(Path(path))}: {count} places" for path, count in places.items()])
        raise


def cython_lint() -> None:
    """Lint of all Cython."""
    shell("cython-lint", *files(".pyx", ".pxi", ".pxd", under="src"))


def mypy() -> None:
    """Types of the package, of its stub, and of how it is used."""
    files(".py", under="src/millstream")
    shell(sys.executable, "-m", "mypy", "--strict", "src/millstream", "tests/typing")


def stubtest() -> None:
    """The hand-written stub against the compiled extension."""
    if not (PACKAGE / "_native.pyi").exists():
        raise Failed("no stub yet")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "mypy.stubtest", "millstream._native"]
        command += ["--allowlist", str(ROOT / "tests" / "stubtest_allow.txt")]
        command += ["--mypy-config-file", str(ROOT / "pyproject.toml"), "--ignore-unused-allowlist"]
        in_place = {"PYTHONPATH": str(ROOT / "src")} if any(PACKAGE.glob("_native*.so")) else {}
        env = {"MYPYPATH": str(ROOT / "src"), **in_place}
        try:
            shell(sys.executable, "-c", "import millstream._native", cwd=scratch, env=env)
        except Failed as error:
            if "ModuleNotFoundError: No module named 'millstream" not in str(error):
                raise
            raise Failed("the extension is neither installed nor built in place") from None
        shell(*command, cwd=scratch, env=env)


def strict_c() -> None:
    """The core compiles without a warning, as release and as debug build."""
    files(".c", under="csrc")
    for debug in ("0", "1"):
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "setup.py", "-q", "build_clib", "--force"]
            command += ["--build-temp", scratch, "--build-clib", scratch]
            shell(*command, env={"MILLSTREAM_WERROR": "1", "MILLSTREAM_DEBUG": debug})


REFUSED = [  # what GCC 14 and clang 16 refuse, and what else is ours to mend in generated C
    "incompatible-pointer-types", "int-conversion", "implicit-function-declaration", "implicit-int",
    "return-type", "sign-compare", "unused-result", "address-of-packed-member", "uninitialized",
]  # fmt: skip
ONLY_GCC = ["discarded-qualifiers"]
ONLY_CLANG = [
    "incompatible-function-pointer-types",
    "incompatible-pointer-types-discards-qualifiers",
]


def new_clang() -> list[str]:
    """A clang that refuses what clang 16 and later refuse: of the machine, or PyPI's ziglang."""
    for name in ("clang-22", "clang-21", "clang-20", "clang-19", "clang"):
        if shutil.which(name):
            version = re.search(r"version (\d+)", shell(name, "--version"))
            if version and int(version[1]) >= 19:
                return [name]
    return [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all"]


def every_compiler() -> None:
    """The generated binding and the core compile with the machine's GCC and a current clang."""
    with tempfile.TemporaryDirectory() as scratch:
        for number, compiler in enumerate((["gcc"], new_clang())):
            core_objects(Path(scratch) / f"core{number}", *compiler, *C_FLAGS, "-Werror", "-fPIC")
        generated = Path(scratch) / "_native.c"
        shell(sys.executable, "-m", "cython", "-3", "-o", generated, PACKAGE / "_native.pyx")
        options = ["-O0", "-fPIC", "-c", "-I", "csrc", "-I", sysconfig.get_path("include")]
        for compiler, names in ((["gcc"], ONLY_GCC), (new_clang(), ONLY_CLANG)):
            errors = [f"-Werror={name}" for name in [*REFUSED, *names]]
            shell(*compiler, *options, *errors, "-o", os.devnull, generated)


def guide_tables() -> None:
    """The tables of the guide are those of the code."""
    shell(sys.executable, "tests/guide_tables.py", "--check")


def workflows() -> None:
    """Workflows parse, are hardened, and pin every action by commit."""
    wrong = []
    for path in files(".yml", under=".github/workflows"):
        for number, line in enumerate(path.read_text().split("\n"), 1):
            uses = re.match(r"\s*(?:- )?uses: +(\S+)(.*)", line)
            pinned = uses and re.search(r"@[0-9a-f]{40}$", uses[1]) and re.match(r" # v\d", uses[2])
            if uses and not pinned:
                wrong.append(f"{where(path, number)}: not pinned as `owner/action@commit # v1.2.3`")
    fail_on(wrong)
    shell("zizmor", "--offline", "--no-progress", "--quiet", "--strict-collection", ".github")


def pythons() -> None:
    """Metadata, wheels, the workflow of the suite and the guide name the same Pythons."""
    text = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("pyproject.toml", ".github/workflows/tests.yml", "docs/guide/install.md")
    }
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text["pyproject.toml"])
    suite = re.findall(r"^ +python: \[(.*)\]", text[".github/workflows/tests.yml"], re.M)
    guide = re.findall(
        r"^\| Python \| CPython (.*), with the GIL", text["docs/guide/install.md"], re.M
    )
    for place, found in (("the suite's workflow", suite), ("docs/guide/install.md", guide)):
        if [re.findall(r"3\.\d+", each) for each in found] != [named]:
            raise Failed(f"{place} names {found}, the classifiers {named}")
    for arch in ("x86_64", "aarch64"):
        command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--archs", arch]
        found = set(shell(*command, "--print-build-identifiers").split())
        wanted = {
            f"cp{version.replace('.', '')}-{libc}linux_{arch}"
            for version in named
            for libc in ("many", "musl")
        }
        if found != wanted:
            raise Failed(f"cibuildwheel selects {sorted(found)}, not {sorted(wanted)}")


# full, asan, tsan, fuzz, bench --------------------------------------------------------------------


def pytest() -> None:
    """The whole suite on the installed package."""
    shell(sys.executable, *SUITE, live=True)


def wheel_from_sdist() -> None:
    """The sdist holds all that wheel and suite need: build, install and test in clean places."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shell(sys.executable, "-m", "build", "--outdir", scratch, ROOT, cwd=scratch)
        (sdist,) = scratch.glob("*.tar.gz")
        (wheel,) = scratch.glob("*.whl")
        shutil.unpack_archive(sdist, scratch / "sdist", filter="data")
        (unpacked,) = (scratch / "sdist").iterdir()
        with zipfile.ZipFile(wheel) as archive:
            stray = [entry for entry in archive.namelist() if Path(entry).suffix in SOURCE]
        fail_on([f"{entry} has no business in a wheel" for entry in stray])
        shell(sys.executable, "-m", "venv", scratch / "venv")
        python = scratch / "venv" / "bin" / "python"
        shell(python, "-m", "pip", "install", "-q", f"{wheel}[test]")
        shutil.rmtree(unpacked / "src")
        shell(python, *SUITE, cwd=unpacked, live=True)


SMOKE = ["append", "codecs", "durability", "pickles", "queue", "read", "stream", "transaction"]
"""Tests of tests/unit that tell a wheel that works from one that does not, in a minute."""


def release() -> None:
    """What would be published: sdist and wheels are whole, install, and pass the suite.

    MILLSTREAM_SMOKE=1 runs a part of the suite from the wheel instead of all of it.
    """
    smoke = [f"tests/unit/test_{name}.py" for name in SMOKE]
    suite = smoke if os.environ.get("MILLSTREAM_SMOKE") == "1" else []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shell(sys.executable, "-m", "build", "--outdir", scratch, ROOT, cwd=scratch)
        (sdist,) = scratch.glob("*.tar.gz")
        (wheel,) = scratch.glob("*.whl")
        show(shell(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel))
        show(shell("check-wheel-contents", wheel))
        wheel = manylinux(wheel, scratch / "manylinux")
        shutil.unpack_archive(sdist, scratch / "sdist", filter="data")
        (unpacked,) = (scratch / "sdist").iterdir()
        shutil.rmtree(unpacked / "src")  # what is installed is what is tested
        python = installed(scratch / "of_sdist", f"{sdist}[test]")
        shell(python, *SUITE, "-x", smoke[0], cwd=unpacked, live=True)
        tools = ["hypothesis", "pytest", "pytest-benchmark", "pytest-timeout", "pytest-xdist"]
        no_compiler = {"PATH": str(scratch / "bare" / "bin"), "CC": "/no/compiler"}
        python = installed(scratch / "bare", "--only-binary=:all:", wheel, *tools, env=no_compiler)
        shell(python, *SUITE, "-x", *smoke, cwd=unpacked, env=no_compiler, live=True)
        python = installed(scratch / "of_wheel", f"{wheel}[test]")
        shell(python, *SUITE, *suite, cwd=unpacked, live=True)


def manylinux(wheel: Path, goal: Path) -> Path:
    """The wheel for every Linux whose libc is as old as its symbols allow."""
    tool = [sys.executable, "-m", "auditwheel"]
    shown = shell(*tool, "show", wheel)
    show(shown)
    tag = re.search(r"manylinux_\d+_\d+_\w+", shown)
    if tag is None:
        raise Failed(f"{wheel.name} fits no manylinux: see auditwheel show")
    shell(*tool, "repair", "--only-plat", "--plat", tag[0], "--wheel-dir", goal, wheel)
    (repaired,) = goal.glob("*.whl")
    show(f"{repaired.name}: {repaired.stat().st_size >> 10} KiB")
    return repaired


def show(text: str) -> None:
    """Print what a tool says of what would be published, for who reads the log of a release."""
    for line in text.splitlines():
        if line.strip():
            print(f"     {line}", flush=True)


def installed(venv: Path, *what: str | Path, env: dict[str, str] | None = None) -> Path:
    """Install into a fresh environment; gives its interpreter."""
    shell(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    shell(python, "-m", "pip", "install", "-q", *what, env=env or {})
    return python


@contextmanager
def built_copy(
    env: dict[str, str], prepare: Callable[[Path], None] = lambda copy: None
) -> Iterator[Path]:
    """Give a copy of the tree, its extension built in place with these switches of setup.py."""
    files(".pyx", under="src")
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name).resolve() / "copy"
        for path in tree():
            goal = copy / path.relative_to(ROOT)
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, goal)
        prepare(copy)
        shell(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=copy, env=env)
        yield copy


def is_under_test(copy: Path, env: dict[str, str], *before: str) -> None:
    """Fail where what `import millstream` loads is not the extension of the copy."""
    where_from = "import millstream._native as native; print(native.__file__)"
    loaded = shell(*before, sys.executable, "-c", where_from, cwd=copy.parent, env=env).strip()
    if not Path(loaded).is_relative_to(copy):
        raise Failed(f"the extension under test is {loaded}, not that of {copy}")


# Address space randomised as far as new kernels do leaves no room for the shadow of TSan.
UNRANDOM = ["setarch", "-R"] if shutil.which("setarch") else []


def under_sanitizer(
    kind: str, libraries: list[str], options: dict[str, str], tests: list[str]
) -> None:
    """Run tests with the core and the binding built for a sanitizer, which Python is not."""
    env = {"MILLSTREAM_SANITIZE": kind}
    with built_copy(env) as copy:
        env |= {"PYTHONPATH": str(copy / "src"), **options}
        paths = [shell("gcc", f"-print-file-name={name}").strip() for name in libraries]
        before = [*UNRANDOM, "env", f"LD_PRELOAD={' '.join(paths)}"]
        is_under_test(copy, env, *before)
        command = [sys.executable, *SUITE, "-p", "no:cacheprovider"]
        command += ["--capture=sys", *tests]  # or a report dies with the process
        shell(*before, *command, cwd=copy, env=env, live=True)


def sanitized() -> None:
    """The whole suite with the core and the binding under AddressSanitizer and UBSan."""
    options = {
        "PYTHONMALLOC": "malloc",
        # Tests take memory away; what they get then is an error and no report.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    under_sanitizer("address,undefined", ["libasan.so", "libubsan.so"], options, ["tests"])


THREADED = [
    "altering", "append", "arrow", "async", "background", "batch", "capacity", "compaction",
    "dedup", "durability", "groups", "opening_at_once", "pipe", "producer", "queue",
    "queue_async", "queue_corners", "queue_store", "read", "retention", "store", "stream",
    "transaction", "transaction_effects", "transaction_pending", "transaction_waits", "view",
]  # fmt: skip
"""Tests of what threads share. TSan sees one process: those of several would show it nothing."""


def threads_of_the_suite() -> None:
    """What threads share, through the Python face, with core and binding under TSan."""
    tests = [f"tests/unit/test_{name}.py" for name in THREADED]
    options = {"TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:detect_deadlocks=0"}
    under_sanitizer("thread", ["libtsan.so"], options, tests)


def covered() -> None:
    """The suite, counting lines of C, Cython and Python: each error path runs, or has a reason."""
    build = {"MILLSTREAM_COVERAGE": "1", "CC": reached.COMPILER}
    with built_copy(build, reached.prepare) as copy:
        env = reached.environment(copy)
        is_under_test(copy, env)
        command = [sys.executable, *SUITE, "-p", "no:cacheprovider", "tests"]
        # The programs of tests/c stay there; what tests that passed have stored does not.
        command += [
            f"--basetemp={copy.parent / 'pytest'}",
            "-o",
            "tmp_path_retention_policy=failed",
        ]
        command += [f"--ignore={path}" for path in reached.LEFT_OUT]
        try:
            shell(*command, cwd=copy, env=env, live=True)
        finally:
            reached.report(copy)


def thread_programs() -> None:
    """Every tests/c/thread_*.c with the core, under ThreadSanitizer (it sees one mapping only)."""
    programs = sorted((ROOT / "tests" / "c").glob("thread_*.c"))
    if not programs:
        raise Failed("no tests/c/thread_*.c")
    compiler = ["gcc", *C_FLAGS, "-fsanitize=thread", "-I", "csrc", "-I", "tests/c"]
    with tempfile.TemporaryDirectory() as scratch:
        core = core_objects(Path(scratch) / "core", *compiler)
        for path in programs:
            program = Path(scratch) / path.stem
            shell(*compiler, "-o", program, path, *core)
            env = {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1"}
            shell(*UNRANDOM, program, env=env, timeout=600)


def core_objects(folder: Path, *compiler: str) -> list[Path]:
    """Compile the core once for all harnesses."""
    folder.mkdir()
    core = files(".c", under="csrc")
    goals = [folder / f"{source.stem}.o" for source in core]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one, to: shell(*compiler, "-c", "-o", to, one), core, goals))
    return goals


def fuzz_harnesses() -> None:
    """Replay each corpus under ASan and UBSan; look for more for a minute in all, by libFuzzer.

    MILLSTREAM_FUZZ_SECONDS looks longer: that many seconds for each harness.
    """
    folder = ROOT / "tests" / "fuzz"
    harnesses = sorted(folder.glob("fuzz_*.c"))
    if not harnesses:
        raise Failed("no tests/fuzz/fuzz_*.c")
    seconds = int(os.environ.get("MILLSTREAM_FUZZ_SECONDS", max(5, 60 // len(harnesses))))
    clang = next(filter(shutil.which, ["clang", *(f"clang-{n}" for n in range(22, 13, -1))]), "")
    if not clang:
        raise Failed("clang is not installed; it comes with libFuzzer, which looks for what is new")
    common = [*C_FLAGS, "-DMS_DEBUG", "-I", "csrc", "-fno-sanitize-recover=all"]
    replaying = ["gcc", *common, "-fsanitize=address,undefined"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shell(sys.executable, folder / "corpora.py", scratch)
        core = core_objects(scratch / "replaying", *replaying)
        searching = [clang, *common, "-fsanitize=fuzzer,address,undefined"]
        covered = [clang, *common, "-fsanitize=fuzzer-no-link,address,undefined"]
        covered_core = core_objects(scratch / "searching", *covered)
        for path in harnesses:
            program = scratch / path.stem
            corpus = sorted((scratch / path.stem.removeprefix("fuzz_")).iterdir())
            shell(*replaying, "-o", program, path, folder / "replay.c", *core)
            shell(program, *corpus, timeout=300)
            shell(*searching, "-o", program, path, *covered_core)
            found = scratch / "found" / path.stem
            found.mkdir(parents=True)
            limits = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=2048"]
            keep = f"-artifact_prefix={ROOT}/"
            told = shell(program, *limits, keep, found, corpus[0].parent)
            print(f"     {path.name}: {told.strip().splitlines()[-1]}")


def fuzz_python() -> None:
    """Each harness of the Python face for half a minute; with atheris where it is installed.

    MILLSTREAM_FUZZ_SECONDS looks longer, and needs it: without atheris what is tried is drawn
    blindly, which is better than nothing before a commit and no fuzzing at night.
    """
    blind = importlib.util.find_spec("atheris") is None
    if blind and "MILLSTREAM_FUZZ_SECONDS" in os.environ:
        raise Failed("atheris is not installed; python -m pip install atheris==3.0.0")
    seconds = os.environ.get("MILLSTREAM_FUZZ_SECONDS", "30")
    harnesses = sorted((ROOT / "tests" / "fuzz").glob("fuzz_*.py"))
    if not harnesses:
        raise Failed("no tests/fuzz/fuzz_*.py")
    for path in harnesses:
        told = shell(sys.executable, path, seconds, timeout=int(seconds) + 600)
        print(f"     {path.name}: {told.strip().splitlines()[-1]}")
    if blind:
        print("     BLIND: atheris is not installed, so no coverage has led what was tried")


def site() -> None:
    """The site builds without a warning, and the pictures are those of their sources."""
    for script in ("draw.py", "rows.py"):
        shell(sys.executable, f"docs/pictures/{script}", "--check")
    goal = ROOT / "build" / "site"
    env = {"NO_MKDOCS_2_WARNING": "1"}
    # Not -q: what is not logged is not counted, and --strict lets it pass.
    shell(sys.executable, "-m", "mkdocs", "build", "--strict", "-d", goal, env=env)


def benchmarks() -> None:
    """Every benchmarks/bench_*.py."""
    files(".py", under="benchmarks")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-enable"]
    shell(*command, "--benchmark-only", "--timeout=0", live=True)


FAST = [
    Step("mypy --strict", mypy),
    Step("stubtest", stubtest),
    Step("core with -Werror", strict_c),
    Step("versions of Python", pythons),
    Step("workflows", workflows),
    Step("ruff", ruff),
    Step("clang-format", clang_format),
    Step("cython-lint", cython_lint),
    Step("tidy", tidy),
    Step("sleeps", sleeps),
    Step("layers of C", c_layers),
    Step("layers of Python", python_layers),
    Step("private names of other floors", privates),
    Step("constants", constants),
    Step("docs: links and snippets", docs),
    Step("names in comments and docs", names),
    Step("docs: tables of the guide", guide_tables),
]
VERBS = {
    "fast": FAST,
    "full": [
        *FAST,
        Step("C with GCC and a current clang", every_compiler),
        Step("pytest", pytest, alone=True),
        Step("wheel from the sdist", wheel_from_sdist, alone=True),
    ],
    "compilers": [Step("C with GCC and a current clang", every_compiler)],
    "asan": [Step("the suite under ASan and UBSan", sanitized, alone=True)],
    "tsan": [
        Step("C threads under TSan", thread_programs, alone=True),
        Step("what threads share, under TSan", threads_of_the_suite, alone=True),
    ],
    "fuzz": [
        Step("fuzz harnesses", fuzz_harnesses, alone=True),
        Step("fuzz the Python face", fuzz_python, alone=True),
    ],
    "cover": [Step("error paths that the suite runs", covered, alone=True)],
    "docs": [Step("the site", site)],
    "bench": [Step("benchmarks", benchmarks, alone=True)],
    "release": [Step("what would be published", release, alone=True)],
}


def attempt(step: Step) -> bool:
    """Run one step and print how it ended."""
    start = time.monotonic()
    word, text = "ok", ""
    try:
        step.run()
    except Failed as error:
        lines = str(error).split("\n")
        if len(lines) > SHOWN:
            lines[SHOWN // 2 : -SHOWN // 2] = [f"... {len(lines) - SHOWN} lines more ..."]
        word, text = "FAIL", "".join(f"\n     {line}" for line in lines)
    except Exception as error:  # a check that breaks is a check that failed
        word, text = "FAIL", f"\n     {type(error).__name__}: {error}"
    print(f"{word:4} {time.monotonic() - start:6.1f} s  {step.name}{text}", flush=True)
    return word != "FAIL"


def main() -> int:
    """Run the steps of a verb; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("-k", default="", metavar="WORD", help="only steps with WORD in their name")
    arguments = parser.parse_args()
    steps = [step for step in VERBS[arguments.verb] if arguments.k in step.name]
    if not steps:
        names = ", ".join(repr(step.name) for step in VERBS[arguments.verb])
        parser.error(f"-k {arguments.k!r} is in the name of no step of {arguments.verb}: {names}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(attempt, [step for step in steps if not step.alone]))
    passed += [attempt(step) for step in steps if step.alone]
    print(f"{passed.count(True)} passed, {passed.count(False)} failed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
