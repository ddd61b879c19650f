"""Draw the pictures of the documentation: each NAME.toml here becomes NAME.svg beside it.

`python docs/pictures/draw.py` writes them; with `--check` it only says which are out of date. The
drawing follows the colour scheme of the reader: dark pages get light lines.
"""

import sys
import tomllib
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
UNIT = 10
STYLE = """
    text { font: 12px "Liberation Sans", Arial, sans-serif; fill: #1d2733; }
    .title { font-weight: bold; }
    .head { font-size: 17px; font-weight: bold; }
    .band { fill: #f1f4f7; }
    .label { fill: #5c6b7a; font-style: italic; text-anchor: end; }
    .process { fill: #ffffff; stroke: #2f5d8a; }
    .thread { fill: #e3edf7; stroke: #2f5d8a; }
    .file { fill: #ffffff; stroke: #5c6b7a; }
    .disk { fill: #e8e4da; stroke: #7a6a45; }
    .truth { fill: #cfe8d2; stroke: #2e7d32; }
    .hint { fill: #fbf0cf; stroke: #b28704; stroke-dasharray: 4 3; }
    .word { fill: #f7d9d4; stroke: #b23c2a; }
    .arrow { stroke: #1d2733; fill: none; }
    .tip { fill: #1d2733; }
    .plate { fill: #f1f4f7; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e4e9ee; }
      .sheet { fill: #15191e; }
      .band, .plate { fill: #1f262e; }
      .label { fill: #9fb0c0; }
      .process, .file { fill: #15191e; }
      .thread { fill: #1d3147; }
      .disk { fill: #37311f; }
      .truth { fill: #1c3d20; }
      .hint { fill: #40360f; }
      .word { fill: #4a1f18; }
      .arrow { stroke: #e4e9ee; }
      .tip { fill: #e4e9ee; }
    }
"""


def text(left: float, top: float, words: str, kind: str = "") -> str:
    """Return one line of text, by its left end and its base line."""
    return f'<text x="{left:g}" y="{top:g}" class="{kind}">{escape(words)}</text>'


def frame(left: float, top: float, wide: float, high: float, kind: str, round: int = 4) -> str:
    """Return a rectangle."""
    place = f'x="{left:g}" y="{top:g}" width="{wide:g}" height="{high:g}"'
    return f'<rect {place} rx="{round}" class="{kind}"/>'


def box(item: dict[str, Any]) -> list[str]:
    """Return a frame with its title and lines."""
    left, top, wide, high = (UNIT * value for value in (*item["at"], *item["size"]))
    lines = [frame(left, top, wide, high, item["kind"])]
    lines.append(text(left + 10, top + 20, item["title"], "title"))
    for number, words in enumerate(item.get("lines", []), 1):
        lines.append(text(left + 10, top + 20 + 17 * number, words))
    return lines


def chip(item: dict[str, Any], boxes: dict[str, dict[str, Any]]) -> list[str]:
    """Return one coloured line within a box; its place counts from the corner of the box."""
    left, top = (
        UNIT * (own + outer) for own, outer in zip(item["at"], boxes[item["in"]]["at"], strict=True)
    )
    wide, high = (UNIT * value for value in item["size"])
    return [
        frame(left, top, wide, high, item["kind"]),
        text(left + 8, top + high / 2 + 4, item["text"]),
    ]


def arrow(item: dict[str, Any]) -> list[str]:
    """Return a line with a tip, and its label on a plate at its middle."""
    (x1, y1), (x2, y2) = ([UNIT * value for value in item[end]] for end in ("from", "to"))
    lines = [f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" class="arrow" marker-end="url(#tip)"/>']
    if item["label"]:
        wide = 5.7 * len(item["label"]) + 12
        left, top = (x1 + x2) / 2 - wide / 2, (y1 + y2) / 2
        lines.append(frame(left, top - 10, wide, 20, "plate"))
        lines.append(text(left + 6, top + 4, item["label"]))
    return lines


def draw(source: str) -> str:
    """Return the SVG of a description."""
    picture = tomllib.loads(source)
    wide, high = (UNIT * value for value in picture["size"])
    boxes = {item["id"]: item for item in picture["box"]}
    body = [frame(0, 0, wide, high, "sheet", 0), text(10, 28, picture["title"], "head")]
    for item in picture.get("band", []):
        left, top, wide_, high_ = (UNIT * value for value in (*item["at"], *item["size"]))
        body.append(frame(left, top, wide_, high_, "band"))
        body.append(text(left + wide_ - 20, top + 18, item["label"], "label"))
    for item in picture["box"]:
        body += box(item)
    for item in picture.get("chip", []):
        body += chip(item, boxes)
    for item in picture.get("arrow", []):
        body += arrow(item)
    for number, item in enumerate(picture.get("legend", [])):
        left, top = 20.0 + 350 * number, high - 55
        body.append(frame(left, top, 26, 18, item["kind"]))
        body.append(text(left + 34, top + 13, item["text"]))
    drawn = "\n".join(f"  {line}" for line in body)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high:g}" role="img">
  <title>{escape(picture["title"])}</title>
  <desc>{escape(picture["description"])}</desc>
  <style>{STYLE}  </style>
  <defs>
    <marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8"
      orient="auto"><path d="M0 0 L10 5 L0 10 z" class="tip"/></marker>
  </defs>
{drawn}
</svg>
""".replace(' class=""', "").replace('class="sheet"', 'class="sheet" fill="#ffffff"')


def main() -> int:
    """Write the pictures, or compare them with what is there."""
    late = 0
    for path in sorted(HERE.glob("*.toml")):
        goal, drawn = path.with_suffix(".svg"), draw(path.read_text(encoding="utf-8"))
        if "--check" not in sys.argv:
            goal.write_text(drawn, encoding="utf-8")
        elif not goal.exists() or goal.read_text(encoding="utf-8") != drawn:
            print(f"{goal.name} is out of date; run python docs/pictures/draw.py")
            late = 1
    return late


if __name__ == "__main__":
    sys.exit(main())
