"""What the benchmarks build on: how much is done, processes that do it, the C limits, the rows.

A benchmark is a function `test_...(bench)` in a `bench_*.py`. It measures in processes of their
own, in turn with the C program that does the same, and ends with one `bench.row(...)`. pytest and
`report.py` both call these functions. Every measured number is seconds (a record, a call or a
byte, as the row's unit says), but for rows of memory, which are bytes, and of counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
VALUE_BYTES = 100
BATCH = 1_000
BATCH_BYTES = 104_128  # of 1,000 values, as they are stored
SINGLE_BYTES = 176  # of one
BURST_BYTES = 32 << 20
WAKE_INTERVAL = 0.0005
WORKER_SECONDS = 300.0

T = TypeVar("T")
Limit = Callable[[], "float | None"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured."""

    name: str
    rounds: int
    append_bytes: int
    """Of values, a round of appends."""
    bursts: int
    log_bytes: int
    """Of the log that is read."""
    walk_bytes: int
    """Of it, what is checked for the first time; and of the log that is recovered."""
    singles: int
    """Records appended one at a time, in a round."""
    reads: int
    """Random ones, in a round."""
    syncs: int
    """Calls in a round."""
    wakes: int
    """Records that a waiting reader gets, in a round."""
    shared: int
    """Records that processes append together, in a round."""
    segments: int
    rival_seconds: float
    """Of a loop."""

    @property
    def disk_bytes(self) -> int:
        """Room that the files of a run take at most."""
        grown = {"tiny": 0, "quick": 5 << 30, "full": 10 << 30}[self.name]  # by bench_growth
        return self.log_bytes + 4 * self.append_bytes + (1 << 30) + grown


TINY = Scale("tiny", 1, 1 << 20, 1, 8 << 20, 2 << 20, 2_000, 200, 5, 20, 2_000, 20, 0.005)
QUICK = Scale("quick", 3, 128 << 20, 5, 1 << 30, 256 << 20, 500_000, 5_000, 300, 700,
              400_000, 1_000, 0.1)  # fmt: skip
FULL = Scale("full", 5, 1 << 30, 12, 10 << 30, 1 << 30, 4_000_000, 50_000, 3_000, 3_000,
             4_000_000, 1_000, 0.35)  # fmt: skip
SCALES = {scale.name: scale for scale in (TINY, QUICK, FULL)}


# --- rows -----------------------------------------------------------------------------------------

RATES = {"M/s": 1e6, "k/s": 1e3, "GB/s": 1e9, "/s": 1.0}
SECONDS = {"ns", "µs", "ms", *RATES}
TIMES = {"calls": 1, "ns": 1e9, "µs": 1e6, "ms": 1e3, "MiB": 1 / (1 << 20), "a second": 1.0,
         "per 1,000": 1e3}  # fmt: skip


def in_unit(value: float, unit: str) -> float:
    """Convert what was measured to what is shown."""
    return 1 / (value * RATES[unit]) if unit in RATES else value * TIMES[unit]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report."""

    question: str
    work: str
    unit: str
    ours: list[float]
    """One a round, in seconds (or bytes); so is `limit`, which is empty where there is none."""
    limit: list[float]
    limit_is: str
    ratio_wanted: float | None
    """Of the limit's median to ours: 0.8 is 80 % of its speed."""
    most_wanted: float | None
    """Median of ours at most."""
    note: str
    series: str = ""
    """Rows of one series are the points of a curve,"""
    at: float = 0.0
    """... this being where."""

    @property
    def median(self) -> float:
        """Return the median of our rounds."""
        return statistics.median(self.ours)

    @property
    def ratio(self) -> float | None:
        """Return our speed as a share of the limit's."""
        if not self.limit or self.median == 0:
            return None
        return statistics.median(self.limit) / self.median

    @property
    def met(self) -> bool | None:
        """Return whether every target is met; None where there is none, or no limit to compare."""
        if self.most_wanted is not None and self.median > self.most_wanted:
            return False
        if self.ratio_wanted is not None:
            return None if self.ratio is None else self.ratio >= self.ratio_wanted
        return None if self.most_wanted is None else True

    def shown(self, values: list[float]) -> str:
        """Return the median and the spread of some rounds in the row's unit."""
        if not values:
            return "-"
        found = sorted(in_unit(value, self.unit) if value else 0.0 for value in values)
        middle = number(statistics.median(found))
        if len(found) == 1:
            return f"{middle} {self.unit}"
        return f"{middle} {self.unit} ({number(found[0])}..{number(found[-1])})"

    @property
    def target(self) -> str:
        """Return what is wanted, as text."""
        wanted = []
        if self.ratio_wanted is not None:
            wanted.append(f"≥ {self.ratio_wanted:g}x")
        if self.most_wanted is not None:
            sign = "≥" if self.unit in RATES else "≤"
            wanted.append(f"{sign} {number(in_unit(self.most_wanted, self.unit))} {self.unit}")
        return ", ".join(wanted) or "-"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON, what was measured in the row's unit."""
        return {
            "question": self.question,
            "work": self.work,
            "unit": self.unit,
            "ours": [in_unit(value, self.unit) if value else 0.0 for value in self.ours],
            "limit": [in_unit(value, self.unit) if value else 0.0 for value in self.limit],
            "limit_is": self.limit_is,
            "ratio": self.ratio,
            "target": self.target,
            "met": self.met,
            "note": self.note,
            "series": self.series,
            "at": self.at,
        }


def number(value: float) -> str:
    """Show three digits or so.

    >>> number(0.123456), number(12.3456), number(12345.6)
    ('0.123', '12.3', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- data -----------------------------------------------------------------------------------------


@functools.cache
def values(count: int) -> list[bytes]:
    """Return different values of 100 bytes, the same in every process."""
    make = random.Random(count)
    return [make.randbytes(VALUE_BYTES) for _ in range(count)]


@functools.cache
def keys(count: int) -> list[bytes]:
    """Return keys as short as tail numbers."""
    return [b"N%05d" % (index * 37 % 99_991) for index in range(count)]


def segment_files(path: str) -> list[str]:
    """Return the segment files of a store, in the order of the log."""
    return [str(file) for file in sorted(Path(path).glob("streams/*/*/*.seg"))]


# --- processes ------------------------------------------------------------------------------------


class WorkerFailed(Exception):
    """A process of a benchmark did not come to its end; says what it printed."""


class Worker:
    """A function in a Python process of its own, which ends without closing anything.

    So nothing that a row left unsynced is synced in another row's time. Functions that leave a
    store to others close it themselves.
    """

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", function.__module__]
        command += [function.__name__, json.dumps(arguments)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._name = f"{function.__module__}.{function.__name__}"
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Return when the function has called `worker.ready()`."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.result()
            raise WorkerFailed(f"{self._name} ended before it was ready")

    def go(self) -> None:
        """Let `worker.ready()` return."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """Wait for the end and return what the function returned."""
        try:
            printed, errors = self._process.communicate(timeout=WORKER_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise WorkerFailed(f"{self._name}: no end after {WORKER_SECONDS:.0f} s") from None
        if self._process.returncode:
            raise WorkerFailed(f"{self._name}: exit {self._process.returncode}\n{errors.strip()}")
        return json.loads(printed.rpartition("ready\n")[2])

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.communicate()


def build_limit(directory: Path) -> Path | None:
    """Compile limit.c; None where there is no compiler."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        return None
    program = directory / "limit"
    sources = [ROOT / "benchmarks" / "limit.c", ROOT / "csrc" / "ms_xxh3.c"]
    command = [*compiler, "-std=c11", "-O3", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


# --- a session ------------------------------------------------------------------------------------


class Bench:
    """One run of the benchmarks: its scale, its directory, what it measured so far."""

    def __init__(self, scale: Scale, parent: str | None = None) -> None:
        self.scale = scale
        self.rows: list[Row] = []
        self.directory = Path(tempfile.mkdtemp(prefix="millstream-bench-", dir=parent or disk()))
        self._program = build_limit(self.directory)
        self._kept: dict[str, Any] = {}
        self._made = 0
        self.question = ""

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` returned when it was first called under this name."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: T = self._kept[name]
        return kept

    def new_path(self) -> str:
        """Return where nothing is yet."""
        self._made += 1
        return str(self.directory / f"{self._made:04d}")

    @contextlib.contextmanager
    def fresh(self) -> Iterator[str]:
        """Give the path of a store that is removed afterwards."""
        path = self.new_path()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def start(self, function: Callable[..., Any], **arguments: Any) -> Worker:
        """Run a function of a benchmark in a process of its own; it waits in `worker.ready()`."""
        return Worker(function, arguments)

    def run(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Run a function of a benchmark in a process of its own, to its end."""
        return Worker(function, arguments).result()

    def run_fresh(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Run a function on a store of its own, which is removed."""
        with self.fresh() as path:
            return self.run(function, path=path, **arguments)

    def limits(self, kind: str, *arguments: object) -> list[float]:
        """Run limit.c: what it measured; nothing where there is no compiler."""
        if self._program is None:
            return []
        command = [str(self._program), kind, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WORKER_SECONDS)
        if done.returncode:
            raise WorkerFailed(f"{' '.join(command[:5])}: {done.stderr.strip()}")
        return [float(line) for line in done.stdout.split()]

    def limit(self, kind: str, *arguments: object) -> float | None:
        """Run limit.c where it measures one thing."""
        measured = self.limits(kind, *arguments)
        return measured[0] if measured else None

    def append_limit(self, count: int, source: str = "pointers", pages: str = "fresh") -> Limit:
        """Return what stores batches of `count` into a new file."""
        arguments = (self.directory, self.scale.append_bytes * 11 // 10, count, source, pages)
        return lambda: self.limit("append", *arguments)

    def in_turn(
        self, ours: Callable[[], float], limit: Limit | None, rounds: int | None = None
    ) -> tuple[list[float], list[float]]:
        """Measure both in turn, so that a busy minute of the machine meets both."""
        first: list[float] = []
        second: list[float] = []
        for _ in range(rounds or self.scale.rounds):
            first.append(ours())
            bound = None if limit is None else limit()
            if bound is not None:
                second.append(bound)
        return first, second

    def row(
        self,
        work: str,
        measured: tuple[list[float], list[float]],
        *,
        unit: str,
        limit_is: str = "",
        ratio: float | None = None,
        most: float | None = None,
        note: str = "",
        series: str = "",
        at: float = 0.0,
    ) -> None:
        """Add a line to the report."""
        ours, limit = measured
        found = Row(self.question, work, unit, ours, limit, limit_is, ratio, most, note, series, at)
        self.rows.append(found)
        self.added(found)

    def added(self, row: Row) -> None:
        """Tell whoever runs the benchmarks; replaced by them."""


# --- the machine ----------------------------------------------------------------------------------


def disk() -> str:
    """Return a directory for temporary files that is on a disk."""
    for path in (tempfile.gettempdir(), "/var/tmp", os.getcwd()):
        if os.path.isdir(path) and file_system(path) not in ("tmpfs", "ramfs"):
            return path
    return tempfile.gettempdir()


def file_system(path: str) -> str:
    """Return the type of the file system that a directory is on."""
    command = ["df", "--output=fstype", path]  # `stat` calls ext4 "ext2/ext3"
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode().split()[-1]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(path: str) -> dict[str, Any]:
    """Return what the figures depend on, and when they were taken."""
    cpu = os.uname().machine
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), cpu)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)),
        "kernel": os.uname().release,
        "file_system": file_system(path),
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load": os.getloadavg()[0],
    }
