"""How many instructions do the hottest calls take? `python -m benchmarks.instructions`.

Counts what callgrind executes in the calling thread, interpreter included, and how many of that are
atomic instructions of the extension, so that no busy machine decides anything. Each call is counted
in thirty parts with the heap moved between them: where the next block of a size lies at the end of
its pool, Python's allocator takes the pool from its list and puts it back for every object that
comes and goes, up to 11 % more for the very same call, in 3 of 113 states of a pool. Holds counts
to the baseline beside (`instructions.json`): more than 2 % above it ends with 1, and so does more
than 2 % below, until `--write` has made that the baseline. Two runs with other paths and
environments differed by 1.2 % at most; what is beyond is counted once more before it is believed.
Counts belong to a compiler, an interpreter, a valgrind and a CPU; those of others are printed and
not judged.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import glob
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "instructions.json"
MOST, LEAST = 0.02, 20
"""Of a count; and a count, since what comes once in a while is a tenth of an atomic a call."""
PARTS = 30
SECONDS = 1200.0
MARKS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void toggle(void) { CALLGRIND_TOGGLE_COLLECT; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


# --- the program that is counted ------------------------------------------------------------------


class Counted:
    """Runs each call some times before it is counted, and some times while it is."""

    def __init__(self, marks: str) -> None:
        self._marks = ctypes.CDLL(marks)
        self._kept: list[bytes] = []

    def __call__(self, name: str, times: int, call: Callable[[], object], warm: int = 10) -> None:
        for _ in range(warm):
            call()
        gc.collect()
        gc.disable()
        self._marks.begin()
        for part in range(PARTS):
            # five more of each size that pools hold: the next block lies elsewhere in its pool
            self._kept += [bytes(size) for size in range(16, 480, 16) for _ in range(5)]
            self._marks.toggle()
            for _ in range(times * part // PARTS, times * (part + 1) // PARTS):
                call()
            self._marks.toggle()
        self._marks.end(f"{name}|{times}".encode())
        gc.enable()


def run(directory: str, marks: str) -> None:
    """Do all of it, in a process under callgrind."""
    import numpy
    import pyarrow

    import millstream
    from millstream.log import ahead

    # How fast a log grows is a question of the machine: here each does, however slow valgrind is.
    ahead.PACES = dict.fromkeys(ahead.PACES, 1e9)
    counted = Counted(marks)
    store = millstream.open(directory, durability="process")
    value, key = b"x" * 100, b"some key"
    thousand, hundred = [value] * 1_000, [value] * 100
    keys = [b"key %d" % (i % 50) for i in range(1_000)]
    rows = numpy.frombuffer(b"".join(thousand), "V100")
    table = pyarrow.table({"value": pyarrow.array(thousand, pyarrow.binary())})

    one, three = store.stream("one", partitions=1), store.stream("three", partitions=3)
    counted("append", 2_000, lambda: one.append(value), 400)
    counted("append with a key", 2_000, lambda: one.append(value, key=key), 400)
    counted("append with a key to 3 partitions", 2_000, lambda: three.append(value, key=key), 400)
    many = store.stream("many", partitions=1)
    warm = 80  # 8 MiB: segments have grown
    counted("append_many, a list of 1,000", 30, lambda: many.append_many(thousand), warm)
    counted("append_many, NumPy of 1,000", 30, lambda: many.append_many(rows), warm)
    counted("append_arrow of 1,000", 90, lambda: many.append_arrow(table), warm)
    by_key = store.stream("by_key", partitions=3)
    counted(
        "append_many by key to 3 partitions",
        30,
        lambda: by_key.append_many(thousand, keys=keys),
        3 * warm,
    )
    producer = many.producer(id="p")
    sequence = itertools.count(1)
    counted("producer.append", 500, lambda: producer.append(value, sequence=next(sequence)), 100)

    counted("get", 2_000, lambda: many.get(0, 5_500), 100)
    counted("read, a batch of 1,000", 20, lambda: sum(map(len, many.read(max_records=30_000))))
    (batch,) = itertools.islice(many.read(), 1)
    counted("values, each of 1,000", 50, lambda: [len(v) for v in batch.values])
    counted("values[i]", 2_000, lambda: batch.values[500], 100)
    singles = store.stream("singles", partitions=1)
    for i in range(2_000):
        singles.append(b"%d" % i)
    counted("read, 2,000 appended singly", 20, lambda: sum(map(len, singles.read())))

    consumer = store.stream("polled", partitions=1).consumer("g", start="earliest")

    def poll() -> None:
        consumer.stream.append(value)
        consumer.commit(consumer.poll(timeout=1))

    counted("append, poll and commit", 400, poll, 50)
    consumer.close()

    queue = store.queue("queue")
    counted("put", 1_000, lambda: queue.put(value), 200)
    counted("get and ack", 1_000, lambda: queue.get(timeout=0).ack(), 100)
    by_100 = store.queue("hundreds")

    def all_of_a_hundred() -> None:
        by_100.put_many(hundred)
        by_100.ack_many(by_100.get_many(100))

    counted("put_many, get_many, ack_many of 100", 40, all_of_a_hundred, 20)

    def transaction() -> None:
        with store.transaction() as tx:
            tx.append(one, value)
            tx.put(queue, value)

    counted("transaction of an append and a put", 200, transaction, 40)
    counted("append at sync", 100, lambda: one.append(value, durability="sync"))
    counted("stats of a stream", 100, one.stats)
    store.close()


# --- counting -------------------------------------------------------------------------------------


def toolchain() -> str:
    """What counts depend on."""

    def first_line(*command: str) -> str:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.partition("\n")[0]

    compiler = first_line(*shlex.split(os.environ.get("CC", "cc")), "--version")
    import millstream  # noqa: F401  # for the name of the Cython that it was built with

    python = f"{platform.python_implementation()} {platform.python_version()}"
    cython = " ".join(sorted(name for name in sys.modules if name.startswith("_cython_")))
    cpu = ""  # libc chooses its functions by it
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    valgrind = first_line("valgrind", "--version")
    return f"{python}, {cython}, {compiler}, {valgrind}, {platform.machine()} {cpu}"


def count() -> dict[str, int]:
    """Instructions of each call, in the thread that makes it."""
    with tempfile.TemporaryDirectory(prefix="millstream-count-") as name:
        marks = os.path.join(name, "marks.so")
        compiler = shlex.split(os.environ.get("CC", "cc"))
        command = [*compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", marks]
        subprocess.run(command, input=MARKS, text=True, check=True)
        program = f"from benchmarks.instructions import run; run({name + '/store'!r}, {marks!r})"
        command = [
            "valgrind",
            "-q",
            "--tool=callgrind",
            "--separate-threads=yes",
            "--instr-atstart=no",
            "--collect-atstart=no",
            "--dump-instr=yes",
            "--compress-pos=no",
            "--compress-strings=no",
        ]
        command += [f"--callgrind-out-file={name}/out", sys.executable, "-c", program]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPYCACHEPREFIX"] = os.path.join(name, "cache")
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(
            command, cwd=HERE.parent, env=environment, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"valgrind ended with {done.returncode}\n{done.stderr[-3000:]}")
        locked = locked_instructions()
        found: list[tuple[int, str, int]] = []
        for file in glob.glob(f"{name}/out*"):
            text = Path(file).read_text(encoding="utf-8", errors="replace")
            mark = re.search(r"^desc: Trigger: Client Request: (.*)\|(\d+)$", text, re.M)
            thread = re.search(r"^thread: (\d+)$", text, re.M)
            total = re.search(r"^(?:summary|totals): (\d+)", text, re.M)
            part = re.search(r"^part: (\d+)$", text, re.M)
            if mark and total and (thread is None or thread[1] == "1"):
                order, times = int(part[1]) if part else 0, int(mark[2])
                found.append((order, mark[1], round(int(total[1]) / times)))
                atomics = round(100 * executed(text, locked) / times)
                found.append((order, f"{mark[1]}: atomic, of 100 calls", atomics))
        return {name: each for _, name, each in sorted(found)}


def locked_instructions() -> set[int]:
    """Where the extension has instructions that lock the bus."""
    from millstream import _native

    command = ["objdump", "-d", "--no-show-raw-insn", str(_native.__file__)]
    listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    atomic = r"^ *([0-9a-f]+):\s+(?:lock |xchg .*\()"  # xchg with memory locks without saying so
    return {int(at, 16) for at in re.findall(atomic, listing, re.M)}


def executed(text: str, addresses: set[int]) -> int:
    """How often instructions of the extension were executed, as callgrind says."""
    count, within, is_call = 0, False, False
    for line in text.split("\n"):
        if line.startswith("ob="):
            within = "_native" in line
        elif line.startswith("calls="):
            is_call = True  # the next line is the cost of what was called
        elif line.startswith("0x"):
            if within and not is_call and int(line.partition(" ")[0], 16) in addresses:
                count += int(line.rpartition(" ")[2])
            is_call = False
    return count


def judged(counts: dict[str, int], baseline: dict[str, int]) -> list[str]:
    """What is not within 2 % of the baseline."""
    wrong = [f"{name}: not in the baseline" for name in counts.keys() - baseline.keys()]
    wrong += [f"{name}: was not counted" for name in baseline.keys() - counts.keys()]
    for name in counts.keys() & baseline.keys():
        change = counts[name] / max(baseline[name], 1) - 1
        if abs(change) > MOST and abs(counts[name] - baseline[name]) > LEAST:
            wrong.append(f"{name}: {counts[name]:,} instead of {baseline[name]:,} ({change:+.1%})")
    return sorted(wrong)


def main() -> int:
    """Count, print, judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make this the baseline")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("not counted: there is no valgrind here")
        return 0
    tools, known = toolchain(), {}
    with contextlib.suppress(FileNotFoundError):
        known = json.loads(BASELINE.read_text(encoding="utf-8"))
    counts = count()
    baseline: dict[str, Any] = known.get(tools, {})
    if options.write or (baseline and judged(counts, baseline)):
        again = count()
        counts = {name: min(each, again.get(name, each)) for name, each in counts.items()}
    for name, each in counts.items():
        before = f"  {each / baseline[name] - 1:+.1%}" if baseline.get(name) else ""
        print(f"{each:>10,}  {name}{before}")
    if options.write:
        known[tools] = counts
        BASELINE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        return 0
    if not baseline:
        print(f"not judged: no baseline of {tools}")
        return 0
    wrong = judged(counts, baseline)
    for line in wrong:
        print(f"beyond {MOST:.0%}: {line}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
