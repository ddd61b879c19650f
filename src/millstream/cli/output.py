"""What the verbs print: data on stdout, chatter on stderr, rich where it is installed and seen.

With `--json` nothing but JSON reaches stdout. Into a pipe goes plain text, one line a row and no
blank one, so that `wc -l` counts; on a terminal tables and lines are laid out for its width, and
painted where rich is installed. The progress bar is shown only when stderr is a terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol, TextIO

BINARY = ("KiB", "MiB", "GiB", "TiB")
DECIMAL = ("", " k", " M", " G")
GAP = 2  # columns of the terminal between two of a table
LEAST_WIDTH = 20


@dataclass(frozen=True)
class Column:
    """One column of a table: its title, its side, how it is painted, and whether it is prose.

    On a narrow terminal only prose is folded, and only between words: half a number is another
    number.
    """

    title: str
    right: bool = False
    style: str = ""
    prose: bool = False


class Progress(Protocol):
    """What a long piece of work calls now and then."""

    def advance(self, count: int) -> None:
        """Say that `count` more units are done."""

    def reach(self, done: int, total: int) -> None:
        """Say how many units are done of how many, where the total was not known before."""


def can_paint(stream: TextIO | None) -> bool:
    """Return whether `stream` is a terminal that can be painted and rich is there to do it."""
    if stream is None or not stream.isatty() or os.environ.get("TERM", "") in ("", "dumb"):
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


class Output:
    """Where one verb prints; `json` switches every table and line of text on stdout off."""

    def __init__(self, json: bool = False) -> None:
        self.json_only = json
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        self.blocks = "█▉▊▋▌▍▎▏" if can_encode("█▏·✓", encoding) else ""

    def say(self, text: str) -> None:
        """Print one line of chatter."""
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)

    def confirm(self, question: str) -> bool:
        """Ask whoever is at the terminal, and return whether the answer was yes."""
        if sys.stderr is not None:
            print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def line(self, text: str, style: str = "") -> None:
        """Print one line of text for people, folded on a terminal; nothing with `--json`."""
        if self.json_only:
            return
        width = terminal_width()
        for part in [text] if width is None else fold(text, width):
            self.print([(part, style)])

    def gap(self) -> None:
        """Print a blank line between two parts, for a terminal; never into a pipe."""
        if not self.json_only and terminal_width() is not None:
            print()

    def print(self, parts: Sequence[tuple[str, str]]) -> None:
        """Print texts with their styles as one line, however long it is."""
        text = "".join(part for part, _ in parts)
        if any(style for _, style in parts) and can_paint(sys.stdout):
            from rich.console import Console
            from rich.text import Text

            painted = Text.assemble(*((part, style) for part, style in parts))
            Console(highlight=False).print(painted, soft_wrap=True)
        else:
            print(text if self.blocks else text.replace("·", "-").replace("✓", "ok"))

    def json(self, value: object) -> None:
        """Print one JSON value on a line of its own."""
        print(to_json(value).decode("utf-8", "backslashreplace"))

    def table(
        self, columns: Sequence[Column], rows: Sequence[Sequence[object]], nothing: str = ""
    ) -> None:
        """Print a table; nothing with `--json`.

        Without rows stdout stays empty, and `nothing` is said instead. A table that is too wide for
        the terminal is folded in its prose; where that is not enough, each row becomes lines of
        one field each.
        """
        if self.json_only:
            return
        if not rows:
            self.say(nothing)
            return
        cells = [[str(cell) for cell in row] for row in rows]
        width = terminal_width()
        widths = fit(columns, cells, width)
        if widths is None:
            assert width is not None
            for line in fields_of(columns, cells, width):
                self.print(line)
            return
        for line in rows_of(columns, cells, widths, rule=can_paint(sys.stdout)):
            self.print(line)

    def bar(self, share: float, width: int = 36) -> str:
        """Return a bar of up to `width` characters for a share from 0 to 1."""
        share = min(max(share, 0.0), 1.0)
        if not self.blocks:
            return "#" * round(share * width)
        eighths = round(share * width * 8)
        part = self.blocks[8 - eighths % 8] if eighths % 8 else ""
        return self.blocks[0] * (eighths // 8) + part

    @contextmanager
    def progress(
        self, title: str, total: int | None, unit: str = "records", chatter: bool = True
    ) -> Iterator[Progress]:
        """Show how far a piece of work is: a bar on a terminal, one line of chatter elsewhere."""
        if can_paint(sys.stderr):
            with rich_progress(title, total, unit) as shown:
                yield shown
        elif sys.stderr is not None and sys.stderr.isatty():
            plain = PlainProgress(title, total)
            try:
                yield plain
            finally:
                plain.finish()
        else:
            if chatter:
                self.say(f"{title} ...")
            yield NoProgress()


class NoProgress:
    """Progress that nobody watches."""

    def advance(self, count: int) -> None:
        """Do nothing."""

    def reach(self, done: int, total: int) -> None:
        """Do nothing."""


class PlainProgress:
    """A progress bar of one line, redrawn when it changes by a hundredth."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title = title
        self.total = total or 0
        self.done = 0
        self.drawn = -1
        self.advance(0)

    def advance(self, count: int) -> None:
        """Count and redraw."""
        self.reach(self.done + count, self.total)

    def reach(self, done: int, total: int) -> None:
        """Redraw the line if the percentage changed."""
        self.done, self.total = done, total
        percent = min(100, self.done * 100 // self.total) if self.total else 0
        if percent != self.drawn:
            self.drawn = percent
            sys.stderr.write(f"\r{self.shown(percent)}")
            sys.stderr.flush()

    def shown(self, percent: int) -> str:
        """Return the line: it must fit, or each redrawing would begin one more."""
        room = shutil.get_terminal_size().columns - len("[] 100 %") - 2
        wide = max(0, min(30, room - 12))
        title = f"{self.title:<{32}.{32}}"[: max(0, min(32, room - wide))]
        return f"{title} [{'#' * (percent * wide // 100):<{wide}}] {percent:3d} %"

    def finish(self) -> None:
        """End the line, so that what follows starts on its own."""
        sys.stderr.write("\n")
        sys.stderr.flush()


@contextmanager
def rich_progress(title: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Show rich's progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description:<30}")]
    if console.width >= 70:
        columns.append(BarColumn(bar_width=min(24, console.width - 58)))
    if console.width >= 60:  # a number is shown whole or not at all
        columns.append(TextColumn("{task.completed:>9,} " + unit, style="dim"))
    columns.append(TimeElapsedColumn())

    class Task:
        def advance(self, count: int) -> None:
            progress.update(task, advance=count)

        def reach(self, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield Task()


def terminal_width() -> int | None:
    """Return how many columns there are on stdout; None where it is no terminal."""
    if not sys.stdout.isatty():
        return None
    return max(shutil.get_terminal_size().columns, LEAST_WIDTH)


def cell_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def fold(text: str, width: int) -> list[str]:
    """Fold a text between words, keeping its indent; a word that is too long stays whole."""
    body = text.lstrip(" ")
    indent = text[: len(text) - len(body)]
    first, *words = body.split(" ")
    lines = [indent + first]
    for word in words:
        if cell_width(lines[-1]) + 1 + cell_width(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines


def cut(text: str, width: int) -> Iterator[str]:
    """Yield a text folded, and words that are too long for a line in pieces."""
    for line in fold(text, width):
        while cell_width(line) > width > 1:
            at = next(at for at in range(len(line), 0, -1) if cell_width(line[:at]) <= width)
            yield line[:at]
            line = line[at:]
        yield line


def fit(columns: Sequence[Column], cells: list[list[str]], width: int | None) -> list[int] | None:
    """Return the widths of columns that fit into a line, folding prose; None where none do."""
    filled = list(zip(*cells, strict=True))
    widths = [
        max(cell_width(text) for text in (column.title, *texts))
        for column, texts in zip(columns, filled, strict=True)
    ]
    if width is None:
        return widths
    least = [
        max(cell_width(word) for text in (column.title, *texts) for word in text.split(" "))
        if column.prose
        else wide
        for column, texts, wide in zip(columns, filled, widths, strict=True)
    ]
    over = sum(widths) + GAP * (len(widths) - 1) - width
    while over > 0:
        room = [wide - few for wide, few in zip(widths, least, strict=True)]
        if not any(room):
            return None
        widest = max((at for at, left in enumerate(room) if left), key=lambda at: widths[at])
        widths[widest] -= 1
        over -= 1
    return widths


def rows_of(
    columns: Sequence[Column], cells: list[list[str]], widths: list[int], *, rule: bool
) -> Iterator[list[tuple[str, str]]]:
    """Yield the lines of a table, as parts with their styles."""
    titles = [column.title for column in columns]
    for number, row in enumerate([titles, *cells]):
        folded = [fold(text, wide) for text, wide in zip(row, widths, strict=True)]
        for line in zip_longest(*folded, fillvalue=""):
            parts: list[tuple[str, str]] = []
            for text, wide, column in zip(line, widths, columns, strict=True):
                space = " " * (wide - cell_width(text))
                shown = space + text if column.right else text + space
                parts += [(shown, column.style if number else "bold"), (" " * GAP, "")]
            yield stripped(parts)
        if rule and number == 0:
            yield [("─" * (sum(widths) + GAP * (len(widths) - 1)), "")]


def stripped(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the parts of a line without the spaces at its end."""
    while len(parts) > 1 and not parts[-1][0].rstrip(" "):
        parts = parts[:-1]
    return [*parts[:-1], (parts[-1][0].rstrip(" "), parts[-1][1])]


def fields_of(
    columns: Sequence[Column], cells: list[list[str]], width: int
) -> Iterator[list[tuple[str, str]]]:
    """Yield a line for each field of each row, for a terminal too narrow for the table."""
    wide = max(cell_width(column.title) for column in columns)
    for row in cells:
        for number, (column, text) in enumerate(zip(columns, row, strict=True)):
            if number and not text:
                continue
            title = f"{'  ' if number else ''}{column.title}"
            title += " " * (wide + 2 + GAP - cell_width(title))
            room = width - cell_width(title)
            for line in cut(text, room) if column.prose else fold(text, room):
                yield stripped([(title, "bold"), (line, column.style)])
                title = " " * cell_width(title)


def can_encode(text: str, encoding: str) -> bool:
    """Return whether the characters exist in an encoding."""
    try:
        text.encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def to_json(value: object) -> bytes:
    """Return a value as JSON on one line, readable where it is valid UTF-8."""
    text = json.dumps(value, ensure_ascii=False, default=plain)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # a path with bytes that are no UTF-8
        return json.dumps(value, default=plain).encode("ascii")


def plain(value: Any) -> object:
    """Return what json does not know as something that it does."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return text_or_base64(bytes(value))
    if hasattr(value, "tolist"):  # NumPy, without importing it
        return value.tolist()
    if hasattr(value, "_asdict"):
        return value._asdict()
    return vars(value) if hasattr(value, "__dict__") else str(value)


def text_or_base64(data: bytes) -> object:
    """Return bytes as text where they are UTF-8, as {"base64": ...} where they are not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        import base64

        return {"base64": base64.b64encode(data).decode("ascii")}


def count_text(count: int) -> str:
    """Return a count with separators: 336,776."""
    return f"{count:,}"


def text_of(value: object) -> str:
    """Return a setting or a figure for people."""
    if isinstance(value, dict):
        parts = [f"{name} {text_of(one)}" for name, one in value.items() if one is not None]
        return ", ".join(parts) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, tuple):
        return " ".join(map(text_of, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 stream, 2 streams, 3 batches."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count_text(count)} {noun}{ending}"


def size_text(size: float) -> str:
    """Return a number of bytes for people: 12.3 MiB."""
    if size < 1024:
        return f"{size:.0f} B"
    power = 1
    while size >= 1024 ** (power + 1) and power < len(BINARY):
        power += 1
    return f"{size / 1024**power:.1f} {BINARY[power - 1]}"


def rate_text(count: float, seconds: float) -> str:
    """Return a rate for people: 27.4 M/s."""
    rate = count / max(seconds, 1e-9)
    power = 0
    while rate >= 999.5 * 1000**power and power < len(DECIMAL) - 1:
        power += 1
    rate /= 1000**power
    return f"{rate:.{0 if rate >= 99.95 else 1}f}{DECIMAL[power]}/s"


def seconds_text(seconds: float) -> str:
    """Return a duration with three digits: 41.2 ms."""
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    if seconds >= 0.9995e-3:
        return f"{seconds * 1e3:.1f} ms"
    if seconds >= 0.9995e-6:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e9:.1f} ns"


def age_text(seconds: float | None) -> str:
    """Return how long ago, in its two largest units: 3 d 4 h."""
    if seconds is None:
        return "-"
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])
