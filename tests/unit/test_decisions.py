"""The index of docs/decisions has a row for each page, by number and title, and tells of gaps."""

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "decisions"


def test_index_has_each_page_and_each_gap():
    rows = re.findall(
        r"^\| (.+) \| (.+) \|$", (PAGES / "index.md").read_text(encoding="utf-8"), re.M
    )
    listed = [row for row in rows if row[0].startswith("[")]
    wanted = []
    for page in sorted(PAGES.glob("[0-9]*.md")):
        number, title = re.match(r"# (\d{4}): (.+)", page.read_text(encoding="utf-8")).groups()
        assert page.name.startswith(number)
        wanted.append((f"[{number}]({page.name})", title))
    assert listed == wanted
    numbers = [int(re.search(r"\d{4}", row[0])[0]) for row in rows if re.search(r"\d{4}", row[0])]
    assert numbers == list(range(1, len(numbers) + 1)), "a gap that no row explains"
