"""What the verbs print: data on stdout, chatter on stderr, rich where it is installed and seen.

With `--json` nothing but JSON reaches stdout. Tables use rich only when stdout is a terminal, the
progress bar only when stderr is one; everything else is plain text that a pipe can take.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

BINARY = ("KiB", "MiB", "GiB", "TiB")
DECIMAL = ("", " k", " M", " G")


@dataclass(frozen=True)
class Column:
    """One column of a table: its title, its side, and how rich paints it."""

    title: str
    right: bool = False
    style: str = ""


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
    """Where one verb prints; `json` turns every table and line of text on stdout off."""

    def __init__(self, json: bool = False) -> None:
        self.json_only = json
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        self.blocks = "█▉▊▋▌▍▎▏" if can_encode("█▏·✓", encoding) else ""

    def say(self, text: str) -> None:
        """Print one line of chatter."""
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)

    def line(self, text: str = "", style: str = "") -> None:
        """Print one line of text for people; nothing with `--json`."""
        if self.json_only:
            return
        if style and can_paint(sys.stdout):
            from rich.console import Console
            from rich.text import Text

            Console(highlight=False).print(Text(text, style=style))
        else:
            print(text if self.blocks else text.replace("·", "-").replace("✓", "ok"))

    def json(self, value: object) -> None:
        """Print one JSON value on a line of its own."""
        print(to_json(value).decode("utf-8", "backslashreplace"))

    def table(
        self, columns: Sequence[Column], rows: Sequence[Sequence[object]], title: str = ""
    ) -> None:
        """Print a table; nothing with `--json`."""
        if self.json_only:
            return
        cells = [[str(cell) for cell in row] for row in rows]
        if can_paint(sys.stdout):
            rich_table(columns, cells, title)
        else:
            for line in plain_table(columns, cells, title):
                print(line)

    def bar(self, share: float, width: int) -> str:
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
            bar = "#" * (percent * 3 // 10)
            sys.stderr.write(f"\r{self.title:<32.32} [{bar:<30}] {percent:3d} %")
            sys.stderr.flush()

    def finish(self) -> None:
        """End the line, so that what follows starts on its own."""
        sys.stderr.write("\n")
        sys.stderr.flush()


@contextmanager
def rich_progress(title: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Show rich's progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>9,} " + unit, style="dim"),
        TimeElapsedColumn(),
    ]

    class Task:
        def advance(self, count: int) -> None:
            progress.update(task, advance=count)

        def reach(self, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield Task()


def rich_table(columns: Sequence[Column], rows: list[list[str]], title: str) -> None:
    """Print a table through rich."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    table.title = Text(title, style="bold") if title else None
    for column in columns:
        side: Any = "right" if column.right else "left"
        table.add_column(column.title, justify=side, style=column.style, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    console.print(table)
    console.print()


def plain_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str
) -> Iterator[str]:
    """Yield the lines of a table as aligned text."""
    widths = [len(column.title) for column in columns]
    for row in rows:
        widths = [max(width, len(cell)) for width, cell in zip(widths, row, strict=True)]
    if title:
        yield title
    for row in [[column.title for column in columns], *rows]:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        yield "  ".join(cells).rstrip()
    yield ""


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
