"""What the site needs beyond Markdown: examples as pages, links that leave docs/, docstrings' code.

A hook of mkdocs and an extension of griffe; pages and docstrings stay readable where they are.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def on_config(config: Any) -> None:
    """Add examples and decisions to the navigation, each with its own title."""
    config.nav.insert(2, {"Examples": [f"examples/{path.stem}.md" for path in EXAMPLES]})
    config.nav[-1]["Inside"].append({"Decisions": [f"decisions/{path.name}" for path in DECISIONS]})


def on_files(files: Files, *, config: Any) -> Files:
    """Make a page of each example: its docstring, then the program."""
    for path in EXAMPLES:
        source = path.read_text(encoding="utf-8")
        about, title = re.match(r'"""(.*?)"""', source, re.S), path.stem.replace("_", " ")
        text = f"# {title.capitalize()}\n\n{about[1] if about else ''}\n\n```python\n{source}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Point links to examples at their pages; drop our own word behind ```python."""
    markdown = re.sub(r"^( *```python)[^\n]*", r"\1", markdown, flags=re.M)
    return re.sub(r"\]\(((?:\.\./)+)examples/(\w+)\.py\)", link_to_example, markdown)


def link_to_example(found: re.Match[str]) -> str:
    """Leave out the step out of docs/."""
    return f"]({found[1].removeprefix('../')}examples/{found[2]}.md)"


class Doctests(griffe.Extension):
    """Fences the examples of docstrings, whose output would be read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put each run of lines from >>> to the next empty one into a block of code.

        The signature that Cython writes first goes: the heading has it, with types.
        """
        if obj.docstring is not None:
            text = re.sub(r"\A[\w.]+\(.*?\)(?: -> .*)?\n+", "", obj.docstring.value)
            fenced = re.sub(
                r"^( *)(>>> .*?)(?=\n\s*\n|\Z)", r"\1```pycon\n\1\2\n\1```",
                text, flags=re.M | re.S,
            )  # fmt: skip
            obj.docstring.value = fenced
