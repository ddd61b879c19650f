"""The parts of the guide that are made from the code: `python tests/guide_tables.py` writes them.

`tests/unit/test_guide_tables.py` holds the pages to it.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from millstream import errors
from millstream.capabilities import NAMES
from millstream.cli import build_parser
from millstream.engines.kafka import capabilities as kafka
from millstream.engines.nats import capabilities as nats
from millstream.engines.rabbitmq import capabilities as rabbitmq
from millstream.store.capabilities import FILE

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
TO_DO = "What to do: "
WRITES = {
    *("append", "create", "alter", "add-partitions", "drop", "compact", "repair", "work", "relay"),
    *("groups seek", "groups rm"),
    *(f"queue {verb}" for verb in ("put", "get", "cancel", "pause", "resume")),
    *(f"queue {verb}" for verb in ("create", "alter", "drop", "dead redrive", "dead purge")),
}
"""The commands that change a store."""
ITS_OWN = {"demo", "bench", "queue bench"}
"""Those that work in a store which they make."""


# --- errors ---------------------------------------------------------------------------------------


def error_tree() -> str:
    """The drawing of errors.py as a code block."""
    lines = str(errors.__doc__).split("\n")
    return "\n".join(["```", *lines[lines.index("MillstreamError") :], "```"]).replace("\n\n", "\n")


def paragraphs(kind: type) -> list[str]:
    """The paragraphs of a docstring, each on one line, as Markdown."""
    found = inspect.cleandoc(str(kind.__doc__)).split("\n\n")
    return [" ".join(one.split()).replace("``", "`") for one in found]


def error_table() -> str:
    """What each error means and what to do, from the docstrings."""
    rows = ["| error | what happened | what to do |", "| --- | --- | --- |"]
    for name in re.findall(r"^[│ ├└─]*([A-Z]\w+)", error_tree(), re.MULTILINE):
        if name == "MillstreamError":
            continue
        what, *rest = paragraphs(getattr(errors, name))
        todo = next((one.removeprefix(TO_DO) for one in rest if one.startswith(TO_DO)), None)
        assert todo is not None, f"the docstring of {name} has no paragraph {TO_DO!r}"
        todo = re.sub(r"docs/guide/(\w+)\.md", r"[\1](\1.md)", todo)
        rows.append(f"| `{name}` | {what} | {todo} |")
    return "\n".join(rows)


# --- commands -------------------------------------------------------------------------------------


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield (words, parser) of each command, as the parser lists them."""
    below = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not below:
        yield " ".join(words), parser
    for name, one in (pair for action in below for pair in action.choices.items()):
        yield from commands(one, (*words, name))


def usage(words: str, parser: argparse.ArgumentParser) -> str:
    """A command with its arguments."""
    shown = [words]
    for action in parser._actions:
        if not action.option_strings:
            name = str(action.metavar)
            many = {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} ..."}
            shown.append(many.get(str(action.nargs), name))
    return " ".join(shown)


def options(parser: argparse.ArgumentParser) -> str:
    """The options of a command but for -h and --json, the long name of each, and what it takes."""
    shown = []
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "json"):
            continue
        names = ", ".join(name for name in action.option_strings if name.startswith("--"))
        takes = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
        if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
            names = f"{names or action.option_strings[0]} {takes or action.dest.upper()}"
        shown.append(f"`{names}`".replace("|", "\\|"))
    return ", ".join(shown)


def command_table() -> str:
    """Every command: what it does, what it takes, whether it writes."""
    rows = ["| command | does | options | writes |", "| --- | --- | --- | --- |"]
    for words, parser in commands(build_parser()):
        writes = "yes" if words in WRITES else "its own store" if words in ITS_OWN else "no"
        does = str(parser.description).split(". ")[0].rstrip(".")
        does = does[0].lower() + does[1:]
        rows.append(f"| `{usage(words, parser)}` | {does} | {options(parser)} | {writes} |")
    return "\n".join(rows)


# --- engines --------------------------------------------------------------------------------------


def capability_table() -> str:
    """Each capability, what it promises, and what each engine says of it."""
    engines = {"`file:`": FILE, "`kafka://`": kafka.of("4.4"),
               "`nats://`": nats.of("2.15.1", False),
               "`rabbitmq://`": rabbitmq.of("4.3.6")}  # fmt: skip
    rows = [
        f"| capability | means | {' | '.join(engines)} |",
        f"| --- | --- |{' --- |' * len(engines)}",
    ]
    for name, means in NAMES.items():
        said = []
        for known in engines.values():
            one = known[name]
            bounds = ", ".join(f"{what} {limit:,.15g}" for what, limit in one.limits.items())
            said.append("; ".join(filter(None, (one.level, one.note, bounds))))
        rows.append(f"| `{name}` | {means} | {' | '.join(said)} |")
    return "\n".join(rows)


# --- pages ----------------------------------------------------------------------------------------


def filled(page: str) -> str:
    """A page with its parts as the code has them now: from a mark to the next empty one."""
    parts = {"error tree": error_tree, "error table": error_table, "commands": command_table,
             "capabilities": capability_table}  # fmt: skip
    for name, make in parts.items():
        mark = rf"(<!-- {name}: tests/guide_tables.py writes it -->\n).*?(\n<!-- end -->)"
        page = re.sub(
            mark, lambda found, make=make: found[1] + make() + found[2], page, flags=re.DOTALL
        )
    return page


PAGES = (GUIDE / "errors.md", GUIDE / "operations.md", GUIDE / "past_one_machine.md")

if __name__ == "__main__":
    for path in PAGES:
        text = path.read_text()
        if "--check" not in sys.argv:
            path.write_text(filled(text))
        elif filled(text) != text:
            sys.exit(f"{path.name}: its tables are not those of the code; run {sys.argv[0]}")
