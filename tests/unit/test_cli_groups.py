"""`millstream groups` as its users meet it, and `verify` of group files."""

import json
import re
import shlex
import subprocess
import sys

import pytest

import millstream
from millstream import inspect

COMMAND = [sys.executable, "-m", "millstream"]


def run(*args, code=0):
    """Run one command, hold it to its exit code, and return it; a traceback is never right."""
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, timeout=600)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    return done.stdout.decode()


def json_of(verb, *args):
    return json.loads(run("groups", verb, *args, "--json"))


@pytest.fixture
def store(tmp_path):
    """The path of a store whose stream `s` has two partitions of ten; group `g` committed four."""
    path = tmp_path / "store"
    with millstream.open(path) as opened:
        stream = opened.stream("s", partitions=2)
        for partition in range(2):
            stream.append_many([b"%d" % i for i in range(10)], partition=partition)
        with stream.consumer(group="g", max_records=4) as consumer:
            consumer.pause(1)
            consumer.poll()
            consumer.commit()
        opened.stream("quiet")
    return path


def test_help_lists_all_verbs():
    text = run("groups", "--help")
    for verb in ("ls", "info", "lag", "seek", "rm"):
        assert verb in text
        run("groups", verb, "--help")


def test_ls_lists_groups_of_one_stream_or_of_all(store):
    found = json_of("ls", store)
    assert found == [{"stream": "s", "group": "g", "members": 0, "lag": 16}]
    assert json_of("ls", store, "quiet") == []
    assert " g " in run("groups", "ls", store, "s")


def test_lag_is_a_number(store):
    assert run("groups", "lag", store, "s", "g") == "16\n"
    assert run("groups", "lag", store, "s", "g", "-p", "0") == "6\n"
    assert json_of("lag", store, "s", "g") == {"stream": "s", "group": "g", "lag": 16}


def test_info_shows_positions_and_living_members(store):
    with millstream.open(store) as opened, opened.stream("s").consumer(group="g") as consumer:
        assert consumer.poll() is not None
        found = json_of("info", store, "s", "g")
        assert [member["partitions"] for member in found["members"]] == [[0, 1]]
        first, second = found["partitions"]
        assert (first["position"], first["lag"]) == ({"epoch": 1, "offset": 4}, 6)
        assert (second["position"], second["owner"]) == (None, 0)
        text = run("groups", "info", store, "s", "g")
        assert "1 member" in text
        assert text.split()[-5:] == ["1", "0", "10", "10", "0"]


def test_seek_sets_positions_of_a_group_without_members(store):
    assert json_of("seek", store, "s", "g", "-2")["positions"] == {"0": 8, "1": 8}
    assert run("groups", "seek", store, "s", "g", "3", "-p", "1") == "partition 1: offset 3\n"
    assert run("groups", "lag", store, "s", "g") == "9\n"
    run("groups", "seek", store, "s", "g", "11", code=3)
    with millstream.open(store) as opened:
        opened.stream("s").append(b"the eleventh", partition=0)
    run("groups", "seek", store, "s", "g", "11", code=3)  # partition 1 has ten: none is moved
    assert run("groups", "lag", store, "s", "g") == "10\n"
    with millstream.open(store) as opened, opened.stream("s").consumer(group="g"):
        run("groups", "seek", store, "s", "g", "earliest", code=3)
        run("groups", "rm", store, "s", "g", code=3)
    run("groups", "seek", store, "s", "g", "latest")
    assert run("groups", "lag", store, "s", "g") == "0\n"


def test_rm_forgets_a_group(store):
    run("groups", "rm", store, "s", "g")
    assert json_of("ls", store) == []
    run("groups", "rm", store, "s", "g", code=3)


def test_what_is_not_there_is_refused(store, tmp_path):
    run("groups", "lag", store, "s", "nobody", code=3)
    run("groups", "lag", store, "nothing", "g", code=3)
    run("groups", "ls", tmp_path / "none", code=3)
    run("groups", "seek", store, "s", "g", "someday", code=2)


# --- the second reader ----------------------------------------------------------------------------


def file_of(store):
    return store / "streams" / "s" / "groups" / "g.group"


def change(path, at, bits=1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= bits
    path.write_bytes(raw)


def test_verify_finds_a_sound_group_sound(store):
    report = inspect.verify(store)
    assert (report.problems, report.notes) == ([], [])


def test_verify_finds_a_damaged_header_and_position(store):
    copies = 20480 + 64
    change(file_of(store), copies + 24)
    [problem] = inspect.verify(store).problems
    assert (problem.kind, problem.position) == ("position", copies)
    assert "groups seek" in problem.advice
    with millstream.open(store) as opened:
        opened.stream("s").group("g").seek(5, partition=0)
    report = inspect.verify(store)
    assert report.ok
    change(file_of(store), 33)
    [problem] = inspect.verify(store).problems
    assert (problem.kind, problem.path) == ("group", file_of(store))
    with (
        millstream.open(store) as opened,
        pytest.raises(millstream.CorruptBatch),
    ):
        opened.stream("s").consumer(group="g")


def command_in(text):
    """The command that a message tells its reader to run, as a shell takes it apart."""
    name, *words = shlex.split(re.search(r"`(millstream groups seek [^`]+)`", text)[1])
    assert name == "millstream"
    return words


@pytest.mark.parametrize("who", ["consumer", "group", "lag", "verify"])
def test_the_command_that_a_damaged_position_asks_for_works_as_printed(store, who):
    path = store.with_name("a store's")
    store.rename(path)
    change(file_of(path), 20480 + 64 + 24)  # its only copy
    if who == "lag":
        done = subprocess.run([*COMMAND, "groups", "lag", path, "s", "g"], capture_output=True)
        assert done.returncode == 4
        text = done.stderr.decode()
    elif who == "verify":
        [problem] = inspect.verify(path).problems
        text = problem.advice
    else:
        with millstream.open(path) as opened, pytest.raises(millstream.CorruptBatch) as caught:
            stream = opened.stream("s")
            if who == "group":
                stream.group("g").positions()
            else:
                with stream.consumer(group="g") as consumer:
                    consumer.poll()
        text = str(caught.value)
        assert "both copies of the position of partition 0 are damaged" in text
    assert run(*command_in(text)) == "partition 0: offset 0\n"
    assert inspect.verify(path).ok
    assert run("groups", "lag", path, "s", "g") == "20\n"


def test_a_member_can_set_a_damaged_position_itself(store):
    change(file_of(store), 20480 + 64 + 24)
    with millstream.open(store) as opened, opened.stream("s").consumer(group="g") as consumer:
        with pytest.raises(millstream.CorruptBatch, match="consumer's own `seek`"):
            consumer.poll()
        consumer.seek(4, partition=0)
        consumer.commit()
        assert consumer.lag() == 16
    assert inspect.verify(store).ok


def test_verify_notes_one_torn_copy_of_two(store):
    with millstream.open(store) as opened, opened.stream("s").consumer(group="g") as consumer:
        while consumer.poll() is not None:
            consumer.commit()
    change(file_of(store), 20480 + 64 + 8)
    report = inspect.verify(store)
    assert report.ok
    assert [note.kind for note in report.notes] == ["position"]


def test_verify_with_any_byte_wrong_ends_well(store):
    path = file_of(store)
    whole = path.read_bytes()
    for at in (*range(96), 20480, *range(20544, 20592), len(whole) - 1):
        change(path, at, 0xFF)
        inspect.verify(store)
        path.write_bytes(whole)
    path.write_bytes(whole[:5000])
    assert not inspect.verify(store).ok
