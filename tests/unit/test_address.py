"""Where a store is: a path or an address; what no scheme is known for makes no directory."""

import os
import subprocess
import sys
from pathlib import Path, PurePath

import pytest

import millstream
from millstream import address, compat, inspect
from millstream.testing import clock


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield
    assert os.listdir() == []


UNKNOWN = [
    "pulsar://127.0.0.1:9092", "amqp://localhost", "redis://u:p@h/v", "s3://bucket/x",
    "Redis://h", "sqlite+aio:///x", "http://127.0.0.1", "millstream://x", "x-y.z://",
]  # fmt: skip


@pytest.mark.parametrize("wrong", UNKNOWN)
def test_a_scheme_that_is_not_known_is_refused_everywhere(tmp_path, wrong):
    with millstream.open(tmp_path / "store") as store:
        for call in (
            millstream.open,
            lambda where: millstream.open(where, mode="r"),
            lambda where: isinstance(where, str) and millstream.open(os.fsencode(where)),
            store.backup,
            inspect.verify,
            inspect.repair,
            inspect.store,
            lambda where: list(inspect.messages(where)),
            lambda where: compat.Queue(path=where),
        ):
            with pytest.raises(millstream.InvalidArgument, match=r"scheme .*file://"):
                call(wrong)


@pytest.mark.parametrize("wrong", ["pulsar:/x", " pulsar://x", "\tredis:/x", "PULSAR:/h:9092"])
def test_an_address_with_one_slash_or_behind_a_blank_makes_no_directory(wrong):
    for given in (wrong, os.fsencode(wrong)):
        with pytest.raises(millstream.InvalidArgument, match="no scheme (pulsar|redis)://"):
            millstream.open(given)
    for wrong in ("file:/x", " file:///x"):
        with pytest.raises(millstream.InvalidArgument, match="file:///PATH"):
            millstream.open(wrong)


@pytest.mark.parametrize("wrong", [*UNKNOWN[:-1], "file:///x"])
def test_an_address_that_went_through_a_path_object_is_refused_as_well(tmp_path, wrong):
    with millstream.open(tmp_path / "store") as store:
        for call in (
            millstream.open,
            store.backup,
            inspect.verify,
            lambda where: compat.Queue(path=where),
        ):
            with pytest.raises(millstream.InvalidArgument, match="must be a str"):
                call(PurePath(wrong))


@pytest.mark.parametrize("verb", ["ls", "info", "verify"])
def test_the_command_line_refuses_it_as_well(verb):
    command = [sys.executable, "-m", "millstream", verb, "pulsar://127.0.0.1:9092"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "scheme pulsar://" in done.stderr


@pytest.mark.parametrize("form", ["file://{}", "FILE://{}", "file://localhost{}"])
def test_a_file_address_is_its_path(tmp_path, form):
    path = tmp_path / "a b%20ö"
    written = form.format(str(path).replace("%", "%25").replace(" ", "%20"))
    with millstream.open(written) as store:
        assert store.path == str(path)
        store.stream("s").append(b"x")
        with millstream.open(path, create=False) as other:
            assert other.streams() == ["s"]
        assert compat.Queue(path=written).empty()
    assert not inspect.verify(written).problems
    command = [sys.executable, "-m", "millstream", "ls", "--json", written]
    assert '"s"' in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_bytes_that_are_no_text_are_kept_in_an_address(tmp_path):
    assert os.fsencode(address.directory("file:///a%FFb")) == b"/a\xffb"


@pytest.mark.parametrize(
    "wrong",
    ["file://", "file:///", "file://host/x", "file://data", "file:///x?mode=ro", "file:///x#y"],
)
def test_a_file_address_that_is_none_is_refused(wrong):
    with pytest.raises(millstream.InvalidArgument, match="address"):
        millstream.open(wrong)


@pytest.mark.parametrize(
    "plain", ["./kafka://x", "a:b", "C:", "1a://b", "://x", "a b://c", "kafka:9092", " x"]
)
def test_what_has_no_scheme_is_a_path(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    with millstream.open(plain) as store:
        assert store.path == os.path.abspath(plain)
        assert Path(plain, "store.json").exists()
    monkeypatch.chdir("empty")


@pytest.mark.parametrize("plain", ["a:b", "C:/x", "1a:/b", "a b:/c", "x/ab:/c"])
def test_a_path_object_that_no_address_was_squeezed_into_is_a_path(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    (tmp_path / plain).parent.mkdir(exist_ok=True, parents=True)
    with millstream.open(Path(plain)) as store:
        assert store.path == os.path.abspath(plain)
    with millstream.open(tmp_path / "ab:") as store:  # an absolute one says what it means
        assert store.path == str(tmp_path / "ab:")
    monkeypatch.chdir("empty")


def test_another_engine_registers_its_scheme(tmp_path, monkeypatch):
    monkeypatch.setitem(address.SCHEMES, "here", lambda text: str(tmp_path / text[7:]))
    with millstream.open("here://store") as store:
        assert store.path == str(tmp_path / "store")
    with pytest.raises(millstream.InvalidArgument, match="file://, here://"):
        millstream.open("there://store")


def test_a_path_of_a_wrong_type_is_refused():
    for wrong in (None, 5, [], object()):
        with clock(), pytest.raises(millstream.InvalidType, match="path"):
            millstream.open(wrong)
