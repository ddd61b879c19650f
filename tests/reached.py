"""Which lines of C and Python a run of the suite executed, and why the others are not.

`report` reads what coverage and gcov wrote into a copy of the tree, prints a line for each file,
and fails where a line did not run that no entry of `unreached.py` gives a reason for, or where an
entry has become untrue. Counts of a process that was killed are lost, so a line that is named here
may have run all the same.
"""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rules import Failed, fail_on
from unreached import UNREACHED


@dataclass
class Counted:
    """What is known of one file; lines are numbered from 1."""

    lines: int = 0
    missed: list[int] = field(default_factory=list)
    functions: dict[int, str] = field(default_factory=dict)
    """First lines, with the name of the function that begins there."""

    def function(self, line: int) -> str:
        """Name of the function that a line lies in; "" outside all."""
        before = [first for first in self.functions if first <= line]
        return self.functions[max(before)] if before else ""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(str(word) for word in command)}: {done.stderr.strip()}")
    return done.stdout


def python_lines(copy: Path) -> Iterator[tuple[str, Counted]]:
    run(sys.executable, "-m", "coverage", "combine", "-q", cwd=copy)
    run(sys.executable, "-m", "coverage", "json", "-q", "-o", "python.json", cwd=copy)
    for name, found in json.loads((copy / "python.json").read_text())["files"].items():
        counted = Counted(found["summary"]["num_statements"], found["missing_lines"])
        for node in ast.walk(ast.parse((copy / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                counted.functions[node.lineno] = node.name
        yield name, counted


def c_lines(copy: Path) -> Iterator[tuple[str, Counted]]:
    """Lines of csrc/, in the extension and in the programs of tests/c together."""
    command = [sys.executable, "-m", "gcovr", "--root", copy, "--filter", f"{copy}/csrc/", "--json"]
    command += ["--merge-mode-functions=merge-use-line-min", "--gcov-ignore-parse-errors=all"]
    for name in json.loads(run(*command, copy.parent, cwd=copy))["files"]:
        counted = Counted()
        for line in name["lines"]:
            counted.lines += 1
            if line["count"] == 0:
                counted.missed.append(line["line_number"])
            if "function_name" in line:
                counted.functions.setdefault(line["line_number"], line["function_name"])
        yield name["file"], counted


def report(copy: Path) -> None:
    """Print what ran, and fail where something did not without a reason."""
    files = sorted([*python_lines(copy), *c_lines(copy)])
    unused = dict(UNREACHED)
    wrong = []
    total = [0, 0]
    for name, counted in files:
        explained: dict[str, int] = defaultdict(int)
        bare: dict[str, list[int]] = defaultdict(list)
        for line in counted.missed:
            function = counted.function(line)
            if (name, function) in UNREACHED:
                unused.pop((name, function), None)
                explained[function] += 1
            else:
                bare[function].append(line)
        missed = len(counted.missed)
        total = [total[0] + counted.lines, total[1] + missed]
        print(f"{name:44} {counted.lines:6,} lines, {missed:4,} not run", flush=True)
        for function, count in explained.items():
            print(f"    {function}: {count}: {UNREACHED[name, function]}")
        for function, lines in bare.items():
            wrong.append(
                f"{name}: {function or 'module'}: {', '.join(map(str, lines))} did not run"
            )
    print(f"{total[0]:,} lines, {total[0] - total[1]:,} of them ran")
    wrong += [f"{name}: {function} runs whole now; its reason can go" for name, function in unused]
    fail_on(wrong)
