"""docs/format.md is the one place with bytes: its tables are what the compiler made."""

import re
from pathlib import Path

from millstream import _native

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


def documented():
    fields = {}
    text = FORMAT.read_text()
    for name, table in re.findall(r"<!-- table: (\w+) -->\n((?:\|.*\n)+)", text):
        for offset, size, field in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", table, re.M):
            fields[name, field] = (int(offset), int(size))
    return fields


def test_every_documented_field_is_compiled_there_and_every_compiled_one_documented():
    compiled = {(name, field): (at, size) for name, field, at, size in _native.format_fields()}
    assert len(compiled) > 50
    assert documented() == compiled
