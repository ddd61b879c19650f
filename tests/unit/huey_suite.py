"""huey's own tests, of the installed wheel, with `MillstreamHuey` where they use `MemoryHuey`.

As a program it runs them, and prints what became of them as JSON.
"""

import importlib
import itertools
import json
import sys
import tempfile
import unittest

from huey.tests import base

from millstream.contrib.huey import MillstreamHuey

MODULES = ("api", "asyncio", "consumer", "crontab", "immediate", "priority", "registry")
MODULES += ("serializer", "signals", "storage", "utils")  # those of `stats` need peewee
OF_MEMORY = "test_chord_bookkeeping_cleared"  # looks at `storage._counters`
made = []


class Swapped(MillstreamHuey):
    """A huey in a store of its own, with the options of a `MemoryHuey`."""

    root = ""
    numbers = itertools.count()

    def __init__(self, name="huey", **options):
        options.setdefault("path", f"{self.root}/{next(self.numbers)}")
        super().__init__(name, durability="process", read_timeout=0.01, **options)
        made.append(self)


class Storage:
    """What a test of `StorageTests` has in place of a storage of huey."""

    def get_huey(self):
        return Swapped(utc=False)


def close_all():
    while made:
        made.pop().storage.close()


def cases(suite):
    for one in suite:
        yield from cases(one) if isinstance(one, unittest.TestSuite) else [one]


def main():
    base.MemoryHuey = Swapped
    tear_down = base.BaseTestCase.tearDown

    def close_and_tear_down(case):
        tear_down(case)
        close_all()

    base.BaseTestCase.tearDown = close_and_tear_down
    suite = unittest.TestSuite()
    for name in MODULES:
        module = importlib.import_module(f"huey.tests.test_{name}")
        if hasattr(module, "MemoryHuey"):
            module.MemoryHuey = Swapped
        if name == "storage":
            found = type("TestStorage", (Storage, module.StorageTests, base.BaseTestCase), {})
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(found))
            continue
        loaded = unittest.defaultTestLoader.loadTestsFromModule(module)
        suite.addTests(case for case in cases(loaded) if OF_MEMORY not in case.id())
    of_storage = sum(isinstance(case, Storage) for case in cases(suite))
    result = unittest.TextTestRunner(stream=sys.stderr).run(suite)
    bad = [case.id() for case, _ in (*result.failures, *result.errors)]
    skipped = [f"{case.id()}: {why}" for case, why in result.skipped]
    counts = {"ran": result.testsRun, "of_storage": of_storage}
    print(json.dumps({**counts, "bad": bad, "skipped": skipped}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as Swapped.root:
        main()
