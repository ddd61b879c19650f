"""What users write for sizes and times."""

import copy
import math
import pickle
from datetime import timedelta

import numpy as np
import pytest

from millstream import InvalidArgument, InvalidType, Retention
from millstream.options import check_timeout, integer, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        (np.int64(7), 7),
        ("0", 0),
        ("4096", 4096),
        ("4096 B", 4096),
        ("1k", 1000),
        ("1K", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1.5KiB", 1536),
        (" 10 GiB ", 10 << 30),
        ("10gb", 10**10),
        ("2M", 2_000_000),
        ("3TiB", 3 << 40),
        ("1PB", 10**15),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "wrong", ["", "KiB", "-1", "10 XB", "10i", "10iB", "1e3", "1,5k", "0x10", "ten", "nan", -1]
)
def test_sizes_that_make_no_sense(wrong):
    with pytest.raises(InvalidArgument):
        parse_bytes(wrong)


@pytest.mark.parametrize("wrong", [1.5, None, b"10", True, [], 10.0])
def test_sizes_of_a_wrong_type(wrong):
    with pytest.raises(InvalidType):
        parse_bytes(wrong)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0),
        (2.5, 2.5),
        ("500us", 0.0005),
        ("250ms", 0.25),
        ("90s", 90),
        ("90m", 5400),
        ("24h", 86400),
        ("30d", 2592000),
        ("2w", 1209600),
        ("1y", 31557600),
        ("1.5 h", 5400),
        (timedelta(days=1), 86400),
    ],
)
def test_ages(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "wrong",
    ["", "30", "d", "-1d", "1 month", -1, 10**400, math.nan, math.inf, timedelta(seconds=-1)],
)
def test_ages_that_make_no_sense(wrong):
    with pytest.raises(InvalidArgument):
        parse_seconds(wrong)


@pytest.mark.parametrize("wrong", [None, True, b"1d", []])
def test_ages_of_a_wrong_type(wrong):
    with pytest.raises(InvalidType):
        parse_seconds(wrong)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"bytes": "much"}, InvalidArgument),
        ({"bytes": 1.5}, InvalidType),
        ({"age": "long"}, InvalidArgument),
        ({"age": math.inf}, InvalidArgument),
        ({"records": -1}, InvalidArgument),
        ({"records": "5"}, InvalidType),
        ({"records": 1.5}, InvalidType),
    ],
)
def test_retention_that_makes_no_sense(wrong, error):
    with pytest.raises(error):
        Retention(**wrong)


def test_retention_is_copied_pickled_and_printed():
    keep = Retention(bytes="1KiB", age="2m")
    for again in (pickle.loads(pickle.dumps(keep)), copy.copy(keep), copy.deepcopy(keep)):
        assert again == keep
    assert eval(repr(keep), {"Retention": Retention}) == keep
    assert repr(Retention()) == "Retention(bytes=None, age=None, records=None)"


def test_counts_and_time_outs():
    assert integer("n", np.int8(5), 0, 5) == 5
    assert type(integer("n", np.int8(5), 0)) is int
    assert check_timeout(None) is None
    assert check_timeout(0) == 0.0
    assert check_timeout(np.float64(1.5)) == 1.5
    assert check_timeout(math.inf) == 1e9
    for wrong in (6, -1):
        with pytest.raises(InvalidArgument, match="n .*from 0 to 5"):
            integer("n", wrong, 0, 5)
