"""Which lines of C, Cython and Python a run of the suite executed, and why the others are not.

What is an error path is a matter of rule, not of judgement:

- Python and Cython: each `raise` (and `fail` of the binding), all that stands in an `except`, and
  the plain statements just before a `raise` in its block;
- C: each `return` of a negative number, or of a status that is a failure or has a class in
  errors.py (`ms_status.h` has the list), and the plain statements just before it;
- each line of a file or function that is there for recovery: `RECOVERY` names them.

A status that is only passed on (`MS_TRY`) is no path of its own: the one that failed is.

`report` reads what coverage and gcov wrote into a copy of the tree, prints a row for each file, and
fails where a line of an error path did not run and `unreached.py` gives no reason, or where a
reason fits no such line any more. The copy has one statement of C in a line, so that a condition
and its `return` are counted apart. Counts of a process that another one kills are lost; one that
kills itself, or leaves by `os._exit`, writes them first (`tests/counted`).
"""

import ast
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rules import Failed, fail_on, shell
from unreached import SOMETIMES, UNREACHED

RECOVERY_FILES = (
    "csrc/ms_recover.c",
    "csrc/ms_sweep.c",
    "src/millstream/transactions/applier.py",
    "src/millstream/inspect/mending*.py",
    "src/millstream/transactions/journal.py",
    "src/millstream/log/recovery.py",
)
RECOVERY = re.compile("recover|mend|repair|replay|sweep|take_over|rebuild|roll_?back|undo")
BEGINS = re.compile(r"\s*(?:cpdef|cdef|async def|def)\b[^=]*?(\w+)\(")  # a function of Cython
COMPILER = str(Path(__file__).parent / "counted" / "cc")
LEFT_OUT = (  # they compile, measure or check other things, slowly
    "tests/unit/test_benchmarks_smoke.py",
    "tests/unit/test_guide_tables.py",
    "tests/unit/test_import_time.py",
    "tests/unit/test_planted_faults.py",
    "tests/unit/test_typing.py",
)
INLINE = (  # how clang-format takes statements apart
    "AllowShortBlocksOnASingleLine: Never",
    "AllowShortCaseLabelsOnASingleLine: false",
    "AllowShortIfStatementsOnASingleLine: Never",
    "AllowShortLoopsOnASingleLine: false",
)


@dataclass
class Counted:
    """What is known of one file; lines are numbered from 1."""

    name: str
    text: list[str]
    ran: set[int]
    missed: set[int]
    functions: dict[int, str] = field(default_factory=dict)
    """Line to function, for all lines of functions."""
    errors: set[int] = field(default_factory=set)

    def finish(self) -> "Counted":
        """Add the lines of recovery to those of error paths; keep those that can be counted."""
        whole = any(fnmatchcase(self.name, pattern) for pattern in RECOVERY_FILES)
        lines = self.ran | self.missed
        self.errors &= lines
        self.errors |= {
            line for line in lines if whole or RECOVERY.search(self.functions.get(line, ""))
        }
        return self

    def shown(self, line: int) -> str:
        return f"{self.name}:{self.functions.get(line, '')}:{self.text[line - 1].strip()}"


def indent(line: str) -> int:
    return len(line) - len(line.lstrip()) if line.strip() else 1000


def before(text: list[str], number: int) -> Iterator[int]:
    """The lines just before one, at its depth."""
    depth = indent(text[number - 1])
    while number > 1 and indent(text[number - 2]) == depth:
        number -= 1
        yield number


def block(text: list[str], number: int) -> Iterator[int]:
    """A line, and those behind it that are deeper."""
    depth = indent(text[number - 1])
    yield number
    while number < len(text) and indent(text[number]) > depth:
        number += 1
        yield number


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(str(word) for word in command)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def prepare(copy: Path) -> None:
    """Put each statement of the core in a line of its own; .clang-format has all else."""
    path = copy / ".clang-format"
    own = {option.split(":")[0] for option in INLINE}
    kept = [line for line in path.read_text().split("\n") if line.split(":")[0] not in own]
    path.write_text("\n".join([*(line for line in kept if line != "..."), *INLINE]) + "\n")
    shell("clang-format", "-i", *sorted((copy / "csrc").glob("*.c")), cwd=copy)


def environment(copy: Path) -> dict[str, str]:
    """What the suite and all of its children count with."""
    return {
        "CC": COMPILER,
        "COVERAGE_FILE": str(copy / ".coverage"),
        "COVERAGE_PROCESS_START": str(copy / "pyproject.toml"),
        "PYTHONPATH": f"{copy / 'src'}:{copy / 'tests' / 'counted'}",
    }


def python_errors(tree: ast.AST) -> Iterator[int]:
    """Lines of error paths of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            yield from range(node.body[0].lineno, (node.end_lineno or 0) + 1)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list) and statements:
                if not isinstance(statements[-1], ast.Raise):
                    continue
                for statement in reversed(statements):
                    if hasattr(statement, "body"):
                        break
                    yield from range(statement.lineno, (statement.end_lineno or 0) + 1)


def python_lines(copy: Path) -> Iterator[Counted]:
    import coverage  # of the measuring run alone

    whole = coverage.CoverageData(str(copy / ".coverage"))
    for path in copy.glob(".coverage.*"):
        part = coverage.CoverageData(str(path))
        with contextlib.suppress(coverage.CoverageException):  # killed while it wrote
            part.read()
            whole.update(part)
    whole.write()
    run(sys.executable, "-m", "coverage", "json", "-q", "-o", "python.json", cwd=copy)
    for name, found in json.loads((copy / "python.json").read_text())["files"].items():
        text = (copy / name).read_text(encoding="utf-8")
        ran, missed = set(found["executed_lines"]), set(found["missing_lines"])
        counted = Counted(name, text.split("\n"), ran, missed)
        tree = ast.parse(text)
        for node in ast.walk(tree):  # outer ones first
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = range(node.lineno, (node.end_lineno or 0) + 1)
                counted.functions.update(dict.fromkeys(lines, node.name))
        counted.errors = set(python_errors(tree))
        yield counted.finish()


def failures(copy: Path) -> re.Pattern[str]:
    """What a `return` of C that is an error looks like."""
    rows = re.findall(r'XX\((\w+), (-?\d+), "(\w*)"', (copy / "csrc/ms_status.h").read_text())
    names = "|".join(name for name, value, error in rows if int(value) < 0 or error)
    failing = rf"ms_fail\(|FAIL_COLUMN\(|complain\(|-\d|-E\w+|-errno|.*\bMS_(?:{names})\b"
    return re.compile(rf"\s*return (?:{failing})")


def statements(copy: Path) -> dict[str, set[int]]:
    """The lines of the binding that code was made of, as the generated file names them."""
    (generated,) = copy.glob("build/temp*/src/millstream/_native.c")
    found: dict[str, set[int]] = defaultdict(set)
    marks = re.findall(r'^ */\* "(.+)":(\d+)$', generated.read_text(encoding="utf-8"), re.M)
    for name, line in marks:
        found[name].add(int(line))
    return found


def gcov(copy: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What gcov has of each line, from all objects of the extension and of the programs."""
    with tempfile.TemporaryDirectory() as scratch:  # gcov makes files where it runs
        for notes in sorted(copy.parent.rglob("*.gcno")):
            found = json.loads(run("gcov", "--json-format", "--stdout", notes, cwd=Path(scratch)))
            for file in found["files"]:
                path = Path(found["current_working_directory"], file["file"]).resolve()
                if path.is_relative_to(copy):
                    for line in file["lines"]:
                        yield str(path.relative_to(copy)), line


def c_lines(copy: Path) -> Iterator[Counted]:
    """Lines of csrc/ and of the binding, in the extension and in the programs of tests/c."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    functions: dict[str, dict[int, str]] = defaultdict(dict)
    made = statements(copy)
    for name, line in gcov(copy):
        function, number = line.get("function_name", ""), line["line_number"]
        if name.startswith("csrc/") or (name.startswith("src/") and number in made[name]):
            counts[name][number] += line["count"]
            functions[name][number] = function
    fails = failures(copy)
    for name, count in counts.items():
        text = (copy / name).read_text(encoding="utf-8").split("\n")
        ran = {number for number in count if count[number]}
        counted = Counted(name, text, ran, set(count) - ran, functions[name])
        cython = not name.startswith("csrc/")
        for number, line in enumerate(text, 1):
            if cython and (begins := BEGINS.match(line)):
                counted.functions.update(dict.fromkeys(block(text, number), begins[1]))
            if re.match(r"\s*(raise\b|fail\()", line) if cython else fails.match(line):
                counted.errors |= {*block(text, number), *before(text, number)}
            if cython and re.match(r"\s*except\b.*:", line):
                counted.errors |= set(block(text, number)) - {number}
        yield counted.finish()


def explained(entries: Iterable[str], shown: str) -> list[str]:
    """Those of the entries that name a line, given as path:function:text."""
    path, function, text = shown.split(":", 2)
    found = []
    for entry in entries:
        parts = (*entry.split(":", 2), "*", "*")
        if all(map(fnmatchcase, (path, function, text), parts)):
            found.append(entry)
    return found


def report(copy: Path) -> None:
    """Print what ran, and fail where an error path did not without a reason."""
    files = sorted([*python_lines(copy), *c_lines(copy)], key=lambda counted: counted.name)
    why = {
        entry: reason
        for kind in (UNREACHED, SOMETIMES)
        for reason in kind
        for entry in kind[reason]
    }
    may_run = {entry for entries in SOMETIMES.values() for entry in entries}
    named, wrong = dict.fromkeys(why, 0), []
    sums = {"C": [0] * 5, "Cython": [0] * 5, "Python": [0] * 5}
    print(f"{'':40}    lines    run | error paths    run  named", flush=True)
    for counted in files:
        count = 0
        for line in sorted(counted.missed & counted.errors):
            entries = explained(why, counted.shown(line))
            for entry in entries:
                named[entry] += 1
            count += bool(entries)
            if not entries:
                wrong.append(f"{counted.shown(line)} (line {line}) did not run")
        for line in sorted(counted.ran & counted.errors):
            for entry in explained(may_run, counted.shown(line)):
                named[entry] += 1
        row = [len(counted.ran) + len(counted.missed), len(counted.ran), len(counted.errors),
               len(counted.errors & counted.ran), count]  # fmt: skip
        kind = {".py": "Python", ".c": "C", ".h": "C"}.get(Path(counted.name).suffix, "Cython")
        sums[kind] = [a + b for a, b in zip(sums[kind], row, strict=True)]
        print(table_row(counted.name, row))
    for kind, row in sums.items():
        print(table_row(kind, row), f" ({100 * row[1] / max(row[0], 1):.1f} % of lines)")
    for entries in (UNREACHED, SOMETIMES):
        for reason, names in entries.items():
            print(f"named, {sum(named[name] for name in names)}: {reason}")
    for entry, count in named.items():
        if count == 0:
            wrong.append(f"{entry}: no such line is left out; its reason can go: {why[entry]}")
    fail_on(wrong)


def table_row(name: str, row: list[int]) -> str:
    lines, ran, errors, reached, named = row
    return f"{name:40} {lines:8,} {ran:6,} | {errors:11,} {reached:6,} {named:6,}"
