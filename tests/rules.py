"""The house rules that no other tool holds, and what every step of check.py is built on."""

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from layers import C_LAYERS, PYTHON_LAYERS, PYTHON_ONLY

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "millstream"
COLUMNS = 100
SOURCE = (".c", ".h", ".pyx", ".pxi", ".pxd")
CODE = (*SOURCE, ".py", ".pyi")
TEXT = (*CODE, ".md", ".toml", ".yml", ".in")
LEFTOVER = re.compile(r"\b(?:TO" "DO|FIX" r"ME)\b(?!\(#\d+\))")
MACHINE = re.compile(r"/(?:home|root|Users|work)/\w")
SLEEP = re.compile(r"\btime\.sleep\(|\bEvent\(\)\.wait\([0-9.]")
SLEEPS = 28  # in tests, and fewer with each change; `timing.until` and the clock replace them
EVIL = re.compile(r"\bpickle\.(?:loads?|Unpickler)\b|(?<![\w.])(?:eval|exec)\(")


class Failed(Exception):
    """What is wrong, one line each."""


def shell(*command: str | Path, live: bool = False, **options: object) -> str:
    """Run a command and return what it printed; a non-zero end is a failure with its output."""
    words = [str(word) for word in command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    env = {**os.environ, "PATH": path, **options.pop("env", {})}  # type: ignore[dict-item]
    options.setdefault("cwd", ROOT)
    if not live:
        options.update(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, **options)  # type: ignore
    except FileNotFoundError:
        raise Failed(f"{words[0]} is not installed; pip install '.[dev]'") from None
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(words)}: no end after {error.timeout:.0f} s") from None
    if done.returncode:
        shown = f"{' '.join(words)[:300]}: exit {done.returncode}"
        raise Failed(shown if live else f"{done.stdout.rstrip()}\n{shown}")
    return "" if live else done.stdout


def tree() -> list[Path]:
    """Return every file of the project: what git knows or would add, or all of an sdist."""
    if (ROOT / ".git").exists():
        listed = shell("git", "ls-files", "-z", "-co", "--exclude-standard").split("\0")
        found = [ROOT / name for name in listed if name]
    else:
        found = [path for path in ROOT.rglob("*") if "build" not in path.relative_to(ROOT).parts]
    return sorted(path for path in found if path.is_file())


def files(*suffixes: str, under: str = "") -> list[Path]:
    """Return the project's files with one of the suffixes, or fail."""
    found = [path for path in tree() if path.suffix in suffixes]
    found = [path for path in found if path.is_relative_to(ROOT / under)]
    if not found:
        raise Failed(f"no {' '.join(suffixes)} under {under or 'the tree'}")
    return found


def fail_on(wrong: list[str]) -> None:
    """Raise all findings together."""
    if wrong:
        raise Failed("\n".join(wrong))


def where(path: Path, line: int = 0) -> str:
    """Return `path:line` as editors take it."""
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def tidy() -> None:
    """House rules that no other tool holds."""
    wrong = []
    for path in tree():
        named = path.name in {"run", ".gitignore", ".clang-format"}
        if (path.suffix not in TEXT and not named) or "golden" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        if text and not text.endswith("\n"):
            wrong.append(f"{where(path)}: no newline at the end")
        for number, line in enumerate(lines, 1):
            wrong += [f"{where(path, number)}: {what}" for what in tidy_line(path, line)]
    fail_on(wrong)


def tidy_line(path: Path, line: str) -> Iterator[str]:
    """Yield what is wrong with one line."""
    if path.suffix in CODE and len(line) > COLUMNS:
        yield f"{len(line)} columns"
    if path.suffix in (".c", ".h") and "\t" in line:
        yield "a tab"
    if line != line.rstrip():
        yield "white space at the end"
    if LEFTOVER.search(line):
        yield "work left over without an issue; write it as NAME(#12)"
    here = (str(ROOT) + os.sep, str(Path.home()) + os.sep)
    if MACHINE.search(line) or any(name in line for name in here):
        yield "a path of one machine"
    if path.is_relative_to(PACKAGE) and EVIL.search(line):
        yield "runs code that came as data"


def sleeps() -> None:
    """Tests wait for events and move the clock; the sleeps that are left say why, and get fewer."""
    wrong, count = [], 0
    for path in files(".py", under="tests"):
        if path.name == "rules.py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if SLEEP.search(line):
                count += 1
                if "#" not in line:
                    wrong.append(f"{where(path, number)}: a sleep that does not say why")
    if count > SLEEPS:
        wrong.append(f"{count} sleeps in tests, not {SLEEPS}: wait for an event, move the clock")
    if count < SLEEPS:
        wrong.append(f"{count} sleeps in tests: set SLEEPS of tests/rules.py to it")
    fail_on(wrong)


def c_layers() -> None:
    """Each C file knows what is above it in layers.py, and calls nothing else."""
    wrong, seen = [], set()
    for path in files(".c", ".h", under="csrc"):
        seen.add(path.stem)
        if path.stem not in C_LAYERS:
            wrong.append(f"{where(path)}: {path.stem} is not in tests/layers.py")
            continue
        for number, line in enumerate(path.read_text().split("\n"), 1):
            found = re.match(r'\s*#\s*include\s+"([^"]+)\.h"', line)
            if found and found[1] not in C_LAYERS[: C_LAYERS.index(path.stem) + 1]:
                wrong.append(f"{where(path, number)}: {path.stem} must not know {found[1]}")
    wrong += [f"tests/layers.py: there is no {name}" for name in C_LAYERS if name not in seen]
    fail_on(wrong or c_calls())


def c_calls() -> list[str]:
    """Return what objects of the core want of files below them, whatever their includes say."""
    wanted: dict[str, set[str]] = {}
    home: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sources = files(".c", under="csrc")
        shell("cc", "-std=c11", "-O0", "-w", "-pthread", "-c", *sources, cwd=scratch)
        for path in sources:
            listed = shell("nm", "-P", "-g", f"{path.stem}.o", cwd=scratch)
            words = [line.split() for line in listed.splitlines()]
            wanted[path.stem] = {name for name, kind, *_ in words if kind == "U"}
            home.update({name: path.stem for name, kind, *_ in words if kind != "U"})
    return [
        f"csrc/{name}.c: {name} must not call {symbol} of {home[symbol]}"
        for name, symbols in sorted(wanted.items())
        for symbol in sorted(symbols & home.keys())
        if C_LAYERS.index(home[symbol]) > C_LAYERS.index(name)
    ]


def is_module(name: str) -> bool:
    """Return whether `millstream.NAME` is a module of ours rather than a public name."""
    below = name.partition(".")[2]
    path = PACKAGE / below
    return (
        below in PYTHON_LAYERS
        or path.is_dir()
        or any(path.with_suffix(end).exists() for end in (".py", ".pyx"))
    )


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, first name below millstream) of every import that runs or may run."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":  # Cython: no parser at hand, and few imports
        for number, line in enumerate(text.split("\n"), 1):
            found = re.match(r"\s*(?:from|c?import)\s+millstream\.(\w+)", line)
            if found:
                yield number, found[1]
        return
    package = ("millstream", *path.relative_to(PACKAGE).parent.parts)
    module = ast.parse(text)
    typing = [  # names for annotations are not dependencies
        node
        for block in ast.walk(module)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for child in block.body
        for node in ast.walk(child)
    ]
    for node in ast.walk(module):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [".".join((*base, *filter(None, [node.module])))]
            if names == ["millstream"]:
                names = [f"millstream.{alias.name}" for alias in node.names]
                names = [name for name in names if is_module(name)] or ["millstream.__init__"]
        for name in names:
            parts = name.split(".")
            if parts[0] == "millstream" and node not in typing:
                yield node.lineno, (*parts, "__init__")[1]


def python_layers() -> None:
    """Imports point upwards only, in the order of layers.py."""
    wrong = []
    for path in files(".py", ".pyx", ".pxi", under="src/millstream"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py").removesuffix(".pyx")
        name = "_native" if name == "_binding" else name
        if name in {"__init__", "__main__"}:
            continue
        if name not in PYTHON_LAYERS:
            wrong.append(f"{where(path)}: {name} is not in tests/layers.py")
            continue
        allowed = PYTHON_ONLY.get(name, PYTHON_LAYERS[: PYTHON_LAYERS.index(name)])
        for line, other in imported(path):
            if other not in (name, *allowed):
                wrong.append(f"{where(path, line)}: {name} must not know {other}")
    fail_on(wrong)


def snippets(path: Path) -> Iterator[tuple[int, bool, str]]:
    """Yield (line, whether it is to be run, code) of every ```python block of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    for block in re.finditer(r"^( *)```python([^\n]*)\n(.*?)^ *```", text, re.M | re.S):
        code = re.sub(rf"^{block[1]}", "", block[3], flags=re.M)
        yield text.count("\n", 0, block.start()) + 2, "run" in block[2].split(), code


def anchors(path: Path) -> set[str]:
    """Return what `#...` may name in a Markdown file, as the usual hosts spell it."""
    titles = re.findall(r"^#+ +(.+?) *#*$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def docs() -> None:
    """Relative links lead somewhere, Python snippets parse."""
    wrong = []
    for path in files(".md"):
        text = re.sub(r"^ *```.*?^ *```", lambda m: "\n" * m[0].count("\n"),
                      path.read_text(encoding="utf-8"), flags=re.M | re.S)  # fmt: skip
        for link in re.finditer(r"\]\(<?([^)\s>]+)>?[^)]*\)", re.sub(r"`[^`\n]*`", "", text)):
            target, _, anchor = link[1].partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            goal = (path.parent / target).resolve() if target else path
            if not goal.exists():
                wrong.append(f"{where(path)}: no {target}")
            elif anchor and goal.suffix == ".md" and anchor not in anchors(goal):
                wrong.append(f"{where(path)}: no heading #{anchor} in {where(goal)}")
        for line, _, code in snippets(path):
            try:
                flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
                compile(code, str(path), "exec", flags=flags, dont_inherit=True)
            except SyntaxError as error:
                wrong.append(f"{where(path, line + (error.lineno or 1) - 1)}: {error.msg}")
    fail_on(wrong)
