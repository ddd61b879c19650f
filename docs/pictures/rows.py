"""Draw files 8 bytes wide into docs/format.md, from the tables of that page.

`python docs/pictures/rows.py` writes the drawings between their marks; with `--check` it only says
whether they are those of the tables.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent.parent / "format.md"
CELL = 10  # characters a byte
RULE = "+" + "+".join(["-" * (CELL - 1)] * 8) + "+"
SEGMENT = [
    (0, "ms_segment_header", "header page"),
    (4096, "ms_activation", "activation record"),
    (4224, "ms_compaction", "compaction record"),
    (8192, "ms_index_entry", "sparse index: index_count entries"),
    ("data_position", "ms_batch_header", "batches: each a header, then buffers; the next follows"),
]


def fields(text: str, table: str) -> list[tuple[int, int, str]]:
    """Return (offset, size, name) of each field of a table of the page."""
    found = re.search(rf"<!-- table: {table} -->\n((?:\|.*\n)+)", text)
    assert found, table
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", found[1], re.M)
    return [(int(offset), int(size), name) for offset, size, name in rows]


def line(cells: list[tuple[int, str]]) -> str:
    """Return one row of (bytes, words)."""
    return "|" + "|".join(f" {words}".ljust(CELL * size - 1) for size, words in cells) + "|"


def rows(listed: list[tuple[int, int, str]]) -> Iterator[tuple[int, str]]:
    """Yield (offset, row), 8 bytes each; what no field has is reserved."""
    end = max(offset + size for offset, size, _ in listed)
    for start in range(0, end, 8):
        cells, at = [], start
        while at < start + 8:
            has = next((one for one in listed if one[0] <= at < one[0] + one[1]), None)
            if has is None:
                until = min([start + 8, *(one[0] for one in listed if one[0] > at)])
                cells.append((until - at, "0"))
            else:
                until = min(start + 8, has[0] + has[1])
                cells.append((until - at, has[2] if has[0] == at else "..."))
            at = until
        yield start, line(cells)


def segment(text: str) -> str:
    """Return the drawing of a segment file."""
    lines = []
    for place, table, title in SEGMENT:
        lines += [f"{place!s:>13} {title}", " " * 14 + RULE]
        for offset, row in rows(fields(text, table)):
            lines.append(f"{f'+{offset}':>13} {row}")
        lines += [" " * 14 + RULE, ""]
    return "\n".join(lines[:-1])


def drawn(text: str) -> str:
    """Return the page with its drawings as its tables say."""
    return re.sub(
        r"(<!-- drawn: segment -->\n```text\n).*?(```\n)",
        lambda found: f"{found[1]}{segment(text)}\n{found[2]}",
        text,
        flags=re.S,
    )


def main() -> int:
    """Write the drawings, or compare them."""
    text = PAGE.read_text(encoding="utf-8")
    wanted = drawn(text)
    if "--check" not in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print(f"{PAGE.name}: a drawing is out of date; run python docs/pictures/rows.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
