"""The index of promises: `python tests/promises.py` writes docs/promises.md.

Each promise of the README and of docs/format.md, the tests that hold it, and how they do; then
every file of tests with what it holds. `tests/unit/test_promises.py` holds the page to the README,
and to the tests that are there.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"

HEAD = """# Promises and their tests

Written by `python tests/promises.py`. What is promised at each level, how the tests are made, and
what they counted, is in [reliability](reliability.md).

## What is promised

In the words of the README; the last two rows are of [format](format.md).

| promise | held by | how |
| --- | --- | --- |
"""

# Words of the README, as they stand there, and which files of tests/ hold them.
PROMISES = {
    "durable, replayable streams": (
        "unit/test_stream",
        "unit/test_read",
        "property/test_model",
    ),
    "one transaction over both": (
        "unit/test_transaction",
        "unit/test_transaction_effects",
        "property/test_whole_model",
    ),
    "that many processes of one Linux machine share at once": (
        "unit/test_processes",
        "unit/test_opening_at_once",
        "crash/test_kill_storm",
    ),
    "one key, one partition, in order": (
        "unit/test_append",
        "property/test_model",
    ),
    "any process, at any time, from any offset": (
        "unit/test_read",
        "unit/test_processes",
    ),
    (
        "each message is leased to one process, and comes again if that one fails, hangs or "
        "is killed"
    ): (
        "unit/test_queue",
        "unit/test_worker",
        "unit/test_worker_processes",
        "crash/test_queue_kills",
        "crash/test_queue_storm",
    ),
    "returning acknowledges, raising tries again": ("unit/test_worker",),
    "all of it happened or nothing did": (
        "unit/test_transaction",
        "unit/test_transaction_pending",
        "crash/test_transaction_kills",
        "crash/test_transaction_page_drop",
    ),
    "NumPy and Arrow views of the mapped file": (
        "unit/test_batch",
        "unit/test_arrow",
        "c/test_ms_arrow",
    ),
    "What an append has survived when it returns is one word": (
        "unit/test_durability",
        "crash/test_page_drop",
        "crash/test_queue_page_drop",
        "crash/test_transaction_page_drop",
        "crash/test_group_power",
        "crash/test_producer_power_cuts",
        "crash/test_compaction_crash",
    ),
    '"Killed" is SIGKILL at any instruction, of any process, the writer among them': (
        "crash/test_kill_storm",
        "crash/test_queue_kills",
        "crash/test_queue_storm",
        "crash/test_group_kills",
        "crash/test_producer_kills",
        "crash/test_transaction_kills",
        "c/test_ms_crash",
        "c/test_ms_queue_schedules",
        "c/test_ms_group_schedules",
        "c/test_ms_ring",
        "unit/test_planted_faults",
    ),
    "what the dead one held is taken over when the kernel proves that it is dead": (
        "unit/test_members",
        "crash/test_owner_words",
        "crash/test_lives_and_copies",
        "crash/test_group_kills",
    ),
    "Readers see a batch whole or not at all, in order, before and after": (
        "unit/test_read",
        "c/test_ms_segment",
        "crash/test_kill_storm",
        "property/test_model",
        "property/test_queue_model",
        "property/test_whole_model",
    ),
    "After a power cut the log ends behind the last valid batch": (
        "crash/test_page_drop",
        "crash/test_torn_or_corrupt",
    ),
    (
        "reading there raises `CorruptBatch`, nothing is skipped, the bytes are kept, "
        "`repair` is offered"
    ): (
        "crash/test_torn_or_corrupt",
        "crash/test_queue_damage",
        "crash/test_read_only_and_hostile",
        "unit/test_missing_files",
        "unit/test_inspect",
        "unit/test_inspect_queues",
    ),
    (
        "its partition refuses appends until every process has closed the store, and the next"
        " open verifies and syncs it anew"
    ): ("crash/test_failed_sync", "crash/test_queue_faults"),
    "A full disk is `StoreFull`, never a signal; what was stored stays": (
        "crash/test_store_full",
        "crash/test_queue_faults",
    ),
    "network file systems are refused": (
        "crash/test_mounts",
        "unit/test_store",
    ),
    "`position_in` carries that into a SQLite database": ("unit/test_sql_position",),
    "Retention removes whole segments": ("unit/test_retention",),
    "checks what comes out against the source": ("unit/test_demo",),
}

# What the page of the format promises.
OF_THE_FORMAT = {
    "what the engine wrote, a reader that shares no code with it reads the same": (
        "unit/test_inspect",
        "unit/test_inspect_queues",
        "unit/test_format",
    ),
    "every later version reads a store of format 1": ("unit/test_golden",),
}

# How files of tests work, as docs/reliability.md tells it: the others call, and look what comes.
HOW = {
    "kills": ("storm", "_kills", "owner_words", "lives_and_copies", "test_members"),
    "schedules": ("c/test_ms_crash", "schedules", "ms_ring", "planted_faults"),
    "power cuts": ("page_drop", "power", "compaction_crash"),
    "failed calls": ("failed_sync", "queue_faults"),
    "full disks": ("store_full", "queue_faults"),
    "damage": ("torn_or_corrupt", "queue_damage", "hostile"),
    "models": ("property/",),
    "a second reader": ("test_inspect", "test_format"),
    "golden stores": ("golden",),
}


def readme() -> str:
    """The README without marks and breaks of lines."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return " ".join(re.sub(r"\*\*|^- ", "", text, flags=re.M).split())


def test_files() -> list[str]:
    """All files of tests, as `PROMISES` names them."""
    found = [*ROOT.glob("tests/*/test_*.py"), *ROOT.glob("tests/c/test_*.c")]
    return sorted(str(path.relative_to(ROOT / "tests").with_suffix("")) for path in found)


def path_of(name: str) -> Path:
    """The file of a name."""
    return ROOT / "tests" / f"{name}.{'c' if name.startswith('c/') else 'py'}"


def holds(path: Path) -> str:
    """The first sentence of what a file says of itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".c":
        found = re.match(r"\s*/\*(.*?)\*/", text, re.S)
        said = found[1] if found else ""
        said = "\n".join(
            line for line in said.split("\n") if not re.match(r"\s*\*?\s*flags:", line)
        )
        said = re.sub(r"^\s*\*\s?", "", said, flags=re.M).strip()
    else:
        said = ast.get_docstring(ast.parse(text)) or ""
    first = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z`)0-9])\.\s", first)[0].rstrip(".")


def lines() -> Iterator[str]:
    """The rows of both tables."""
    for promise, names in {**PROMISES, **OF_THE_FORMAT}.items():
        tests = ", ".join(f"`tests/{path_of(name).relative_to(ROOT / 'tests')}`" for name in names)
        ways = [how for how, parts in HOW.items() if any(p in n for p in parts for n in names)]
        yield f"| {promise} | {tests} | {', '.join(ways) or 'examples'} |\n"
    yield "\n## Every file of tests, in its own words\n\n| file | holds |\n| --- | --- |\n"
    for name in test_files():
        path = path_of(name)
        said = holds(path).replace("|", "\\|")
        yield f"| `{path.relative_to(ROOT)}` | {said} |\n"


def page() -> str:
    """What the page is to be."""
    return HEAD + "".join(lines())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
