"""The house rules that no other tool holds, and what every step of check.py is built on."""

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from layers import C_LAYERS, FLOORS, ONLY, PARTS, PRIVATE

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "millstream"
COLUMNS = 100
SOURCE = (".c", ".h", ".pyx", ".pxi", ".pxd")
CODE = (*SOURCE, ".py", ".pyi")
TEXT = (*CODE, ".md", ".toml", ".yml", ".in")
LEFTOVER = re.compile(r"\b(?:TO" "DO|FIX" r"ME)\b(?!\(#\d+\))")
MACHINE = re.compile(r"/(?:home|root|Users|work)/\w")
SLEEP = re.compile(r"\b(?:time|asyncio|gevent)\.sleep\((?!0\))|\bEvent\(\)\.wait\([0-9.]")
SLEEPS = 38  # in tests, fewer with each change: those of coroutines and greenlets are counted, too
REPLACED = re.compile(
    r"\b_?settl(?:e|ed|es|ing)\b|\bto be had\b|(?:^|[.:*#\"] )Who [a-z]+s [^?]*$"
    r"|\b(?:un)?mark(?:ed|ing)\b|\bmarks? (?:un)?clean\b|\b(?:last|this|two) sessions?\b"
)
"""What the list of words in docs/design.md has other words for, and "who" that is nobody."""
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
    if path.is_relative_to(PACKAGE) or path.is_relative_to(ROOT / "csrc"):
        for word in REPLACED.findall(line):
            yield f"{word.strip()!r}: see the words of docs/design.md"
    if path.is_relative_to(PACKAGE) and EVIL.search(line):
        yield "runs code that came as data"


def sleeps() -> None:
    """Tests wait for events and move the clock; the sleeps that are left say why, and get fewer."""
    wrong, count = [], 0
    for path in files(".py", under="tests"):
        if path.name in ("rules.py", "unreached.py"):  # the latter quotes lines
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


Import = tuple[int, str, bool]
"""Line, module without `millstream.`, and whether only annotations need it."""


def floor_of(module: str) -> str:
    """Return the floor on which a module stands, by the first part of its name; "": on none."""
    first = module.partition(".")[0]
    first = "_native" if first == "_binding" else first
    return next((floor for floor, names in FLOORS.items() if first in names), "")


def sources() -> Iterator[tuple[Path, str]]:
    """Yield each file of the package, and its module as imports name it."""
    for path in files(".py", ".pyi", ".pyx", ".pxi", under="src/millstream"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__main__",):
            yield path, ".".join(parts).removesuffix(".__init__")


def module_of(names: list[str]) -> str:
    """Return the module that a dotted name below millstream leads to; else `__init__`, the face."""
    for length in range(len(names), 0, -1):
        path = PACKAGE.joinpath(*names[:length])
        if path.is_dir() or any(path.with_suffix(end).exists() for end in (".py", ".pyx")):
            return ".".join(names[:length])
    return "__init__"


def imported(path: Path) -> Iterator[Import]:
    """Yield every import of ours, at the top, in functions, and for annotations."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".pyx", ".pxi"):  # no parser at hand, and few imports
        for number, line in enumerate(text.split("\n"), 1):
            found = re.match(
                r"\s*(?:from|c?import)\s+millstream\b([\w.]*)(?: c?import (.*))?", line
            )
            for name in (found[2] or "").split(",") if found else ():
                words = [*found[1].split("."), name.split(" as ")[0].strip()]
                yield number, module_of([word for word in words if word]), False
        return
    package = ["millstream", *path.relative_to(PACKAGE).parent.parts]
    module = ast.parse(text)
    typing = {
        node
        for block in ast.walk(module)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for child in block.body
        for node in ast.walk(child)
    }
    for node in ast.walk(module):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*base, alias.name] for alias in node.names]
        for parts in names:
            if parts[0] == "millstream":
                yield node.lineno, module_of(parts[1:]), path.suffix == ".pyi" or node in typing


def python_layers() -> None:
    """Between floors nothing points up; within one there is no circle but of parts to their whole.

    Annotations included.
    """
    wrong: list[str] = []
    within: dict[str, set[str]] = {}
    order = list(FLOORS)
    parts = {
        (f"{whole.rpartition('.')[0]}.{part}".lstrip("."), whole)
        for whole in PARTS
        for part in PARTS[whole]
    }
    left = set(parts)
    for path, module in sources():
        if not floor_of(module):
            wrong.append(f"{where(path)}: {module} is on no floor of tests/layers.py")
            continue
        at, only = order.index(floor_of(module)), ONLY.get(module.partition(".")[0])
        for line, other, annotation in imported(path):
            first = other.partition(".")[0]
            if not floor_of(other):
                wrong.append(f"{where(path, line)}: {other} is on no floor of tests/layers.py")
            elif first == module.partition(".")[0] and only is not None:
                continue
            elif order.index(floor_of(other)) > at or (only is not None and first not in only):
                wrong.append(f"{where(path, line)}: must not know {other}, which is above it")
            elif floor_of(other) == order[at] and path.suffix == ".py":
                left.discard((module, other))
                if not annotation or (module, other) not in parts:
                    within.setdefault(module, set()).add(other)
    wrong += [f"tests/layers.py: {part} does not name {whole}" for part, whole in sorted(left)]
    fail_on(wrong + circles(within))


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return what is wrong with imports that lead back to where they began."""
    wrong, left = [], {name: set(others) - {name} for name, others in graph.items()}
    while left:
        done = [name for name, others in left.items() if not others & left.keys()]
        if not done:
            name = min(left)
            seen = [name]
            while (name := min(left[name] & left.keys())) not in seen:
                seen.append(name)
            wrong.append(f"a circle: {' -> '.join([*seen[seen.index(name) :], name])}")
            del left[name]
        for name in done:
            del left[name]
    return wrong


HINTS = {  # what a variable of that name is, where a `_name` alone does not tell
    "store": "store", "stream": "log", "queue": "queues", "log": "log", "members": "disk",
    "group": "groups", "consumer": "groups", "transaction": "transactions", "journal":
    "transactions", "background": "store", "producer": "streams", "view": "streams",
    "clock": "disk", "cache": "log", "ids": "log",
}  # fmt: skip
OF_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    """Return whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name not in OF_TUPLES


def own_names(path: Path) -> set[str]:
    """Return the `_names` that a file defines: of modules, of classes, and of `self`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        if path.suffix == ".pyi":
            return set()
        defined = r"\b(?:c?p?def|class)\b[^\n=(]*?\b(_\w+)\s*(?:\(|:|$|,)|\bself\.(_\w+)\s*=[^=]"
        found = {one for pair in re.findall(defined, text, re.M) for one in pair if one}
        return {name for name in found if is_private(name)}
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            body = node.body if isinstance(node, ast.ClassDef) else ()
        else:
            body = node.body if isinstance(node, ast.Module) else ()
        for one in body:
            targets = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", one)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self._"):
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return {name for name in found if is_private(name)}


def receiver(node: ast.expr) -> str:
    """Return the last name of what an attribute is read of: `store` of `self.store`."""
    if isinstance(node, ast.Call):
        return receiver(node.func)
    name = getattr(node, "attr", None) or getattr(node, "id", "")
    return str(name).strip("_")


def modules_of(path: Path) -> dict[str, str]:
    """Return what modules the names of a file stand for; "": not one of ours."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base = (getattr(node, "module", None) or "").split(".")
            for alias in node.names:
                parts = [*base, alias.name] if isinstance(node, ast.ImportFrom) else [alias.name]
                if parts[0] != "millstream":
                    found[alias.asname or alias.name] = ""
                elif (ours := module_of(parts[1:])) == ".".join(parts[1:]):
                    found[alias.asname or alias.name] = ours
    return found


def reaches() -> Iterator[tuple[str, int, str, str, str]]:
    """Yield (file, line, floor that reads, floor that is read, `_name`) of each reach over a floor.

    Whose a `_name` is, is told by the module it is read of, by the variable's name, or by where
    such a name is defined: what floors have alike and no variable tells apart is not counted.
    """
    homes: dict[str, set[str]] = {}
    for path, module in sources():
        for name in own_names(path):
            homes.setdefault(name, set()).add(floor_of(module))
    for path, module in sources():
        if path.suffix != ".py":
            continue
        own, known, place = floor_of(module), modules_of(path), where(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("millstream"):
                other = floor_of((node.module or "").partition(".")[2])
                for alias in node.names:
                    if (
                        is_private(alias.name)
                        and alias.name != "_native"
                        and other not in ("", own)
                    ):
                        yield place, node.lineno, own, other, alias.name
            if not isinstance(node, ast.Attribute) or not is_private(node.attr):
                continue
            of = receiver(node.value)
            if of in ("self", "cls", "super") or node.attr not in homes:
                continue
            if isinstance(node.value, ast.Name) and node.value.id in known:
                other = floor_of(known[node.value.id])
            elif of in HINTS:
                other = HINTS[of]
            elif own in homes[node.attr]:
                continue
            else:
                other = min(homes[node.attr], key=list(FLOORS).index)
            if other not in ("", own):
                yield place, node.lineno, own, other, node.attr


def constants() -> None:
    """A constant has one home: no two modules give the same value the same name.

    But for what reads the files a second time (`inspect`), which shares nothing with the rest.
    """
    homes: dict[str, list[str]] = {}
    for path in files(".py", under="src/millstream"):
        if path.is_relative_to(PACKAGE / "inspect"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name, value in assigned(node):
                if name.isupper() and name != "TYPE_CHECKING":  # which saves an import of typing
                    homes.setdefault(f"{name} = {ast.unparse(value)}", []).append(where(path))
    fail_on([f"{', '.join(found)}: {said}" for said, found in homes.items() if len(found) > 1])


def assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names that a statement of a module sets, each with its value."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
        yield node.target.id, node.value
    if not isinstance(node, ast.Assign):
        return
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for name, value in zip(target.elts, node.value.elts, strict=True):
                yield ast.unparse(name), value


def privates() -> None:
    """What one floor reads of another's `_names` has a reason, is counted, and gets less."""
    found = Counter(f"{other}.{name}" for _, _, _, other, name in reaches())
    allowed = {name: count for names in PRIVATE.values() for name, count in names.items()}
    wrong = []
    for private in sorted({*found, *allowed}):
        count, most = found[private], allowed.get(private, 0)
        if count > most:
            wrong += [
                f"{path}:{line}: {name} is private to {other}"
                for path, line, _, other, name in reaches()
                if f"{other}.{name}" == private
            ]
            wrong.append(f"{private} is read {count} times from above, not {most}")
        elif count < most:
            wrong.append(f"{private} is read {count} times from above: set PRIVATE to it")
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
