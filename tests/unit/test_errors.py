"""One hierarchy of errors: the core's list names its classes, and users can import each."""

import pickle
import re
from pathlib import Path

import pytest

import millstream
from millstream import _native, errors

CLASSES = {name: getattr(errors, name) for name in errors.__all__}
HEADER = Path(__file__).parents[2] / "csrc" / "ms_status.h"


def test_each_status_names_a_class_that_exists():
    table = _native.status_table()
    assert {name for _, name, _ in table.values() if name} <= CLASSES.keys()
    assert all(text for _, _, text in table.values())
    # A failure without a class is Python's own: there is no memory.
    assert [status for status, (value, name, _) in table.items() if value < 0 and not name] == [
        "NOMEM"
    ]


def test_the_compiled_list_is_that_of_the_header():
    rows = re.findall(r"XX\((\w+), (-?\d+), \"(\w*)\", \"([^\"]+)\"\)", HEADER.read_text())
    assert _native.status_table() == {
        name: (int(value), cls, text) for name, value, cls, text in rows
    }


def test_every_class_is_public():
    public = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert public - {"MillstreamWarning"} == CLASSES.keys() == {*errors.__all__}
    assert sorted(errors.__all__) == errors.__all__
    assert all(issubclass(cls, errors.MillstreamError) for cls in CLASSES.values())
    assert CLASSES.keys() <= set(millstream.__all__)
    assert all(getattr(millstream, name) is cls for name, cls in CLASSES.items())
    assert sorted(millstream.__all__) == millstream.__all__


def test_the_drawing_is_the_hierarchy():
    drawn = {}
    parents = []
    for line in errors.__doc__.split("\n"):
        found = re.match(r"([│ ├└─]*)([A-Z]\w+)(?: \((\w+)\))?(?:  |$)", line)
        if found is None:
            continue
        bars, name, builtin = found.groups()
        depth = len(bars.rstrip()) // 4 + bool(bars)
        parents[depth:] = [name]
        bases = [parents[depth - 1]] if depth else ["Exception"]
        drawn[name] = bases + ([builtin] if builtin else [])
    assert drawn == {name: [b.__name__ for b in cls.__bases__] for name, cls in CLASSES.items()}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_errors_pickle(name):
    cls = CLASSES[name]
    if cls is errors.CorruptBatch:
        error = cls("what", path="file", position=7, expected=1, found=2)
    elif cls is errors.OffsetOutOfRange:
        error = cls("what", partition=3, first=4, next=9)
    elif issubclass(cls, OSError):
        error = cls(5, "what", "file")
    elif cls in (errors.Retry, errors.Snooze):
        error = cls(1.5)
    else:
        error = cls("what")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_storage_errors_carry_what_oserror_carries():
    error = errors.StoreFull(28, "no room", "data/streams")
    assert (error.errno, error.strerror, error.filename) == (28, "no room", "data/streams")
    assert error.appended == ()
