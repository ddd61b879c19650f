"""Builds every C test program with sanitizers and runs it: one runner, one count for C and Python.

A program is `tests/c/test_ms_<module>.c`; it is linked with all of `csrc/` and says with its exit
code whether it passed (0), failed (1) or could not tell on this machine (77). MILLSTREAM_FULL=1
runs several times as many schedules, and steps through more take-overs.
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fuzz import corpora

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "csrc"
SOURCES = sorted(CORE.glob("*.c"))
PROGRAMS = sorted((ROOT / "tests" / "c").glob("test_ms_*.c"))
HARNESSES = sorted((ROOT / "tests" / "fuzz").glob("fuzz_*.c"))
SLOW = {"test_ms_crash", "test_ms_queue_schedules"}

CC = shlex.split(os.environ.get("CC", "cc"))
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-DMS_DEBUG", f"-I{CORE}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SKIPPED = 77
TIMEOUT_S = 1500  # ends what hangs, before pytest does


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and keep all that it prints, errors among the rest."""
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
    )


@dataclass(frozen=True)
class Core:
    """The core, compiled once for all programs that ask for the same flags."""

    build: Path
    sanitizers: list[str]
    """The flags of the sanitizers; empty when this machine has none."""
    compiled: dict[str, list[str]] = field(default_factory=dict)

    def objects(self, own: list[str]) -> list[str]:
        """Return the object files of the core with the flags of a program besides the usual."""
        key = shlex.join(own)
        if key not in self.compiled:
            folder = self.build / f"core{len(self.compiled)}"
            folder.mkdir()
            flags = [*FLAGS, *own, *self.sanitizers, "-pthread"]

            def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
                target = str(folder / f"{source.stem}.o")
                return run([*CC, *flags, "-c", str(source), "-o", target])

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                results = list(pool.map(compile_one, SOURCES))
            problem = "".join(result.stdout for result in results if result.returncode != 0)
            assert not problem, f"csrc does not compile\n{problem}"
            self.compiled[key] = [str(folder / f"{source.stem}.o") for source in SOURCES]
        return self.compiled[key]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c_programs")


@pytest.fixture(scope="module")
def core(build: Path) -> Core:
    if shutil.which(CC[0]) is None:
        reason = f"no C compiler ({CC[0]})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Core(build, find_sanitizers(build))


def own_flags(program: Path) -> list[str]:
    """Return the flags that the first line of a program asks for."""
    with program.open() as file:
        first = file.readline()
    return shlex.split(first.removeprefix("/* flags: ")) if first.startswith("/* flags: ") else []


def find_sanitizers(build: Path) -> list[str]:
    """Return the flags with which an empty program can be built and run, or none."""
    source, target = build / "empty.c", build / "empty"
    source.write_text("int main(void) { return 0; }\n")
    built = run([*CC, *SANITIZERS, str(source), "-o", str(target)])
    works = built.returncode == 0 and run([str(target)]).returncode == 0
    return SANITIZERS if works else []


def test_c_programs_are_built_with_sanitizers(core: Core) -> None:
    if not core.sanitizers:
        pytest.skip("this compiler has no sanitizers: the C programs were run without them")


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            program, marks=pytest.mark.slow if program.stem in SLOW else (), id=program.stem
        )
        for program in PROGRAMS
    ],
)
def test_c_program_passes(program: Path, core: Core, build: Path) -> None:
    target = str(build / program.stem)
    own = own_flags(program)
    flags = [*FLAGS, *own, *core.sanitizers]
    linked = run([*CC, *flags, str(program), *core.objects(own), "-pthread", "-o", target])
    if linked.returncode != 0:
        pytest.fail(f"{program.name} does not build\n{linked.stdout}", pytrace=False)
    try:
        result = run([target])
    except subprocess.TimeoutExpired as error:
        printed = (error.output or b"").decode(errors="replace")
        pytest.fail(f"{program.name} ran for more than {TIMEOUT_S} s\n{printed}", pytrace=False)
    if result.returncode == SKIPPED:
        pytest.skip(result.stdout.strip())
    if result.returncode != 0:
        pytest.fail(
            f"{program.name} ended with {result.returncode}\n{result.stdout}", pytrace=False
        )


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda harness: harness.stem)
def test_corpus_of_a_fuzz_harness_passes(harness: Path, core: Core, build: Path) -> None:
    """Files of foreign bytes, whole and damaged, and what fuzzing has found."""
    name = harness.stem.removeprefix("fuzz_")
    inputs = corpora.corpora()[name]
    folder = build / f"corpus_{name}"
    folder.mkdir()
    for number, raw in enumerate(inputs):
        (folder / f"{number:04}").write_bytes(raw)
    target = str(build / harness.stem)
    sources = [str(harness), str(harness.parent / "replay.c")]
    under = [*sources, *core.objects([])]
    linked = run([*CC, *FLAGS, *core.sanitizers, *under, "-pthread", "-o", target])
    assert linked.returncode == 0, linked.stdout
    result = run([target, *map(str, sorted(folder.iterdir()))])
    assert result.returncode == 0, result.stdout[-5000:]
    assert result.stdout.count(str(folder)) >= len(inputs) > 100
