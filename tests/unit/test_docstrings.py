"""Examples in docstrings do what they say; public names are documented.

The examples of README and docs are run by test_examples.py.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import millstream
from millstream import _native, compat

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(millstream.__path__, "millstream.")
    if not module.name.endswith(("__main__", "_native"))  # for the latter see below
)


PUBLIC_HOMES = ("millstream", "millstream.inspect", "millstream.worker")


class Finder(doctest.DocTestFinder):
    """Finds what a module defines, though public names say that they are of `millstream`."""

    def _from_module(self, module, found):
        if module is None or getattr(found, "__module__", None) not in PUBLIC_HOMES:
            return super()._from_module(module, found)
        defined = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        return found.__qualname__.split(".")[0] in {getattr(one, "name", "") for one in defined}


def run(tests):
    count = 0
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0, f"{test.name}: see its output"
        count += result.attempted
    return count


@pytest.fixture(scope="module", autouse=True)
def store_of_compat():
    """The process has one temporary store, which stays open until its end: here, from the begin."""
    compat.Queue()


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name):
    if name.startswith("millstream.contrib."):
        pytest.importorskip(name, exc_type=ImportError)  # its framework is not here
    run(Finder().find(importlib.import_module(name)))


def documented(owner, prefix):
    """Yield (name, docstring) of everything that an extension's module or class has of its own."""
    for name, value in vars(owner).items():
        full = f"{prefix}.{name}"
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        homes = (_native.__name__, millstream.__name__)
        mine = not inspect.isclass(value) or value.__module__ in homes
        if mine and isinstance(getattr(value, "__doc__", None), str):
            yield full, value.__doc__
        if inspect.isclass(value) and mine:
            yield from documented(value, full)


def test_examples_of_the_extension():
    parser = doctest.DocTestParser()
    tests = [
        parser.get_doctest(text, dict(vars(_native)), name, None, 0)
        for name, text in documented(_native, "_native")
        if ">>>" in text
    ]
    assert {test.name for test in tests} >= {
        "_native.Batch",
        "_native.Batch.values_as",
        "_native.Position",
        "_native.StreamCore.append",
        "_native.StreamCore.append_many",
        "_native.StreamCore.partition_for",
    }
    assert run(tests) > 10


PUBLIC = [name for name in millstream.__all__ if name not in ("__version__", "Durability")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_their_methods_are_documented(name):
    value = getattr(millstream, name)
    assert value.__doc__
    if not inspect.isclass(value):
        return
    for attribute, found in vars(value).items():
        if not attribute.startswith("_") and (callable(found) or isinstance(found, property)):
            assert getattr(found, "__doc__", None), f"{name}.{attribute}"


def test_reference_has_every_public_name_once():
    pages = Path(__file__).resolve().parents[2] / "docs" / "reference"
    lines = "\n".join(page.read_text(encoding="utf-8") for page in pages.glob("*.md"))
    named = re.findall(r"^::: millstream\.(\w+)$", lines, re.M)
    elsewhere = {"__version__", "errors"}  # what is in the module has its own page
    assert sorted(named) == sorted(set(millstream.__all__) - elsewhere)
