"""What comments, docstrings and docs name exists: a word of code, a member, a file.

Checked is what looks like a name: all in backticks, and without them a word with an underscore, a
call, a member of a class or module of ours. It must be a word of code somewhere (not of comments),
of the standard library, or a symbol of libc; behind the dot, a word of what stands before the dot.
"""

import builtins
import ctypes
import importlib
import keyword
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rules import CODE, PACKAGE, ROOT, fail_on, tree, where

WORD = re.compile(r"\w+")
COMMENT = {  # what is no code, and strings, that it is not looked for in them
    ".c": re.compile(r'(?P<prose>/\*.*?\*/)|"(?:\\.|[^"\\\n])*"', re.S),
    ".py": re.compile(
        r'''(?P<prose>^[ \t]*r?"""(?:\\.|[^\\])*?""")|"""(?:\\.|[^\\])*?"""'''
        r"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|(?P<comment>\#[^\n]*)""",
        re.M,
    ),
}
FENCE = re.compile(r"^ *```([^\n]*)\n.*?^ *```", re.M | re.S)
TICKS = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
NAME = re.compile(r"(?<![\w.])(?:_?[a-zA-Z]\w*_\w+|_[a-z]\w+|\w+(?=\(\)))")  # also without ticks
ENDINGS = r"(?:c|h|py|pyi|pyx|pxi|pxd|md|toml|yml|sh|svg)\b"
DOTTED = re.compile(rf"(?<![\w./-])(\w+)\.(?!{ENDINGS}|json)([a-zA-Z_]\w*)")
DIRECTIVE = re.compile(r"# (?:cython|noqa|type):.*")
FILE = re.compile(rf"[\w./-]+\.{ENDINGS}")
CLASS = re.compile(
    r"^([ \t]*)(?:cdef )?class (\w+)(?:\[[^\]]*\])?(?:\(([^)]*)\))?[^\n]*:\n"
    r"(?:\1[ \t]+[^\n]*\n|\n)+",
    re.M,
)
CAPABILITY = re.compile(r'^    "(\w+)\.(\w+)": "', re.M)
OUTSIDE = {"callgrind", "journalctl", "rsync", "ulimit", "valgrind", "wc"}  # commands


def prose(path: Path) -> tuple[str, list[tuple[int, str]]]:
    """Return a file's code, and its (line, text) of comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        said = FENCE.sub(lambda m: blank(m) if m[1] else m[0], text)
        return "", [(1, said)]
    code, said, at = [], [], 0
    for one in COMMENT[".c" if path.suffix in (".c", ".h") else ".py"].finditer(text):
        if one.lastgroup:
            code.append(text[at : one.start()])
            said.append((text.count("\n", 0, one.start()) + 1, one[0]))
            at = one.end()
    return "".join([*code, text[at:]]), said


def homes(code: dict[Path, str]) -> dict[str, set[str]]:
    """Return the words of each module, package and class of ours, and of what a class inherits."""
    found: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path, text in code.items():
        module = path.parent.name if path.stem == "__init__" else path.stem
        found.setdefault(module, set()).update(WORD.findall(text))
        found.setdefault(path.parent.name, set()).add(path.stem)
        found.setdefault(path.parent.parent.name, set()).add(path.parent.name)
        for one in CLASS.finditer(text):
            found.setdefault(one[2], set()).update(WORD.findall(one[0]))
            bases.setdefault(one[2], set()).update(WORD.findall(one[3] or ""))
        if module == "capabilities":  # its keys are names of another kind: `queue.delay`
            for kind, name in CAPABILITY.findall(text):
                found.setdefault(kind, set()).add(name)
    for _ in range(4):  # as deep as classes of ours inherit
        for name, above in bases.items():
            found[name].update(*(found.get(base, ()) for base in above))
    return found


class Known:
    """All that may be named."""

    def __init__(self, paths: list[Path], code: dict[Path, str]) -> None:
        self.paths = [f"/{where(path)}" for path in paths]
        self.words = {word for text in (*code.values(), *self.paths) for word in WORD.findall(text)}
        self.words |= {*dir(builtins), *keyword.kwlist, *sys.stdlib_module_names, *OUTSIDE}
        ours = (PACKAGE, ROOT / "csrc")
        self.members = homes(
            {path: text for path, text in code.items() if any(map(path.is_relative_to, ours))}
        )
        self.libc = ctypes.CDLL(None)

    def has(self, name: str) -> bool:
        """Return whether there is such a word."""
        return name in self.words or hasattr(self.libc, name)

    def is_member(self, owner: str, name: str) -> bool:
        """Return whether `owner.name` may be said; of an owner that is not known, anything."""
        if name in self.members.get(owner, ()):
            return True
        if owner in sys.stdlib_module_names:
            return hasattr(importlib.import_module(owner), name)
        return owner not in self.members

    def wrong(self, said: str) -> Iterator[tuple[int, str]]:
        """Yield (where it stands, what is wrong) of each name that leads nowhere."""
        named = [(one.start(), one[0]) for one in NAME.finditer(DIRECTIVE.sub(blank, said))]
        for tick in TICKS.finditer(said):
            text = DOTTED.sub(lambda m: m[1] if self.is_member(m[1], m[2]) else m[0], tick[1])
            text = re.sub(r"(--[\w-]+) [A-Z]+", r"\1", text)  # what an option takes
            named += [(tick.start(), name) for name in re.findall(r"(?<!\w)[a-zA-Z_]\w+", text)]
            for one in FILE.finditer(tick[1]):
                if not any(path.endswith(f"/{one[0]}") for path in self.paths):
                    yield tick.start(), f"there is no file {one[0]}"
        for at, name in named:
            if not self.has(name):
                yield at, f"there is no {name}"
        for one in DOTTED.finditer(said):
            if one[1] in self.members and not self.is_member(one[1], one[2]):
                yield one.start(), f"{one[1]} has no {one[2]}"


def blank(one: re.Match[str]) -> str:
    """Return as many lines with nothing in them."""
    return "\n" * one[0].count("\n") + " " * (len(one[0]) - one[0].count("\n"))


def read() -> tuple[Known, dict[Path, list[tuple[int, str]]]]:
    """Return all that may be named, and what is said in the package, the core and the docs."""
    paths = [path for path in tree() if "golden" not in path.parts]
    parted = {path: prose(path) for path in paths if path.suffix in (*CODE, ".md", ".toml", ".yml")}
    places = [PACKAGE, ROOT / "csrc", ROOT / "docs", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    said = {
        path: texts for path, (_, texts) in parted.items() if any(map(path.is_relative_to, places))
    }
    return Known(paths, {path: code for path, (code, _) in parted.items()}), said


def names() -> None:
    """What comments, docstrings and docs name exists."""
    known, said = read()
    fail_on(
        [
            f"{where(path, first + text.count(chr(10), 0, at))}: {what}"
            for path, texts in said.items()
            for first, text in texts
            for at, what in dict(known.wrong(text)).items()
        ]
    )
