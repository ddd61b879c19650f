"""`create`, `alter`, `add-partitions` and `drop`; what is made by a typo, and what never is."""

import json
import os
import re

import pytest
from test_cli import at_terminal, read_until
from test_cli_walk import COMMANDS, no_stdin, run  # noqa: F401

import millstream


def json_of(capfd, *arguments, code=0):
    out, err = run(capfd, [*arguments, "--json"], code)
    assert err == []
    return json.loads(out)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_is_created_with_its_settings(path, capfd):
    words = ["--partitions", "3", "--retention-age", "7d", "--retention-bytes", "1GiB"]
    more = ["--segment-bytes", "1MiB", "--durability", "sync", "--compact-min-age", "1h"]
    found = json_of(capfd, "create", path, "s", *words, *more)
    assert found == {
        "stream": "s",
        "partitions": 3,
        "retention": {"bytes": 1 << 30, "age": 604800.0, "records": None},
        "segment_bytes": 1 << 20,
        "durability": "sync",
        "compaction": {**millstream.Compaction(min_age="1h").as_dict()},
    }
    with millstream.open(path, mode="r") as store:
        stream = store.stream("s")
        assert stream.retention == millstream.Retention(age="7d", bytes="1GiB")
        assert stream.compaction == millstream.Compaction(min_age="1h")
        assert (stream.partitions, stream.segment_bytes, stream.durability) == (3, 1 << 20, "sync")


def test_what_is_there_is_created_again_only_where_that_is_said_and_it_is_the_same(path, capfd):
    run(capfd, ["create", path, "s", "--partitions", "2"], 0)
    _, [line] = run(capfd, ["create", path, "s"], 3)
    assert "there is a stream 's'" in line
    run(capfd, ["create", path, "s", "--if-not-exists"], 0)
    run(capfd, ["create", path, "s", "--if-not-exists", "--partitions", "2"], 0)
    for other in (["--partitions", "3"], ["--retention-age", "1d"], ["--durability", "sync"]):
        run(capfd, ["create", path, "s", "--if-not-exists", *other], 3)
    with millstream.open(path, mode="r") as store:
        assert store.stream("s").partitions == 2
        assert store.stream("s").durability == "interval"


def test_alter_changes_what_is_named_and_nothing_else(path, capfd):
    run(capfd, ["create", path, "s", "--retention-age", "7d", "--retention-records", "9"], 0)
    found = json_of(capfd, "alter", path, "s", "--retention-age", "1d")
    assert found["retention"] == {"bytes": None, "age": 86400.0, "records": 9}
    found = json_of(capfd, "alter", path, "s", "--retention-records", "none", "--compact")
    assert found["retention"] == {"bytes": None, "age": 86400.0, "records": None}
    assert found["compaction"] == millstream.Compaction().as_dict()
    found = json_of(capfd, "alter", path, "s", "--compact-min-dirty", "0.25")
    assert found["compaction"] == millstream.Compaction(min_dirty=0.25).as_dict()
    assert json_of(capfd, "alter", path, "s", "--no-compact")["compaction"] is None
    assert json_of(capfd, "alter", path, "s", "--durability", "sync")["durability"] == "sync"
    assert json_of(capfd, "alter", path, "s", "--durability", "store")["durability"] == "interval"
    assert json_of(capfd, "alter", path, "s", "--segment-bytes", "64KiB")["segment_bytes"] == 65536
    run(capfd, ["alter", path, "s"], 2)
    run(capfd, ["alter", path, "s", "--retention-age", "soon"], 2)
    run(capfd, ["alter", path, "s", "--no-compact", "--compact-min-age", "1h"], 3)


def test_partitions_are_added_and_never_removed(path, capfd):
    run(capfd, ["create", path, "s", "--partitions", "2"], 0)
    assert json_of(capfd, "add-partitions", path, "s", "3")["partitions"] == 5
    assert json_of(capfd, "alter", path, "s", "--partitions", "6")["partitions"] == 6
    assert json_of(capfd, "alter", path, "s", "--partitions", "6")["partitions"] == 6
    run(capfd, ["alter", path, "s", "--partitions", "5"], 3)
    run(capfd, ["add-partitions", path, "s", "0"], 2)  # as -1: no count at all
    with millstream.open(path, mode="r") as store:
        assert store.stream("s").partitions == 6


# --- queues ---------------------------------------------------------------------------------------


def test_a_queue_is_created_and_altered(path, capfd):
    words = ["--capacity", "50", "--priorities", "2", "--ordering", "key", "--on-dead", "stop"]
    more = ["--lease", "1m", "--ttl", "7d", "--max-attempts", "3", "--backoff", "5", "--ageing"]
    sizes = ["--slot-bytes", "512", "--payload-bytes", "1MiB", "--payload-max", "64KiB"]
    rest = ["--dedup-window", "1h", "--dead-limit", "7", "--durability", "sync"]
    found = json_of(capfd, "queue", "create", path, "q", *words, *more, *sizes, *rest)
    assert found == {
        "queue": "q",
        "capacity": 50,
        "priorities": 2,
        "ordering": "key",
        "on_dead": "stop",
        "lease": 60.0,
        "ttl": 604800.0,
        "retry": millstream.RetryPolicy(max_attempts=3, backoff=5.0).as_dict(),
        "ageing": True,
        "slot_bytes": 512,
        "payload_bytes": 1 << 20,
        "payload_max": 1 << 16,
        "dedup_window": 3600.0,
        "dead_limit": 7,
        "durability": "sync",
    }
    found = json_of(capfd, "queue", "alter", path, "q", "--backoff", "9", "--ttl", "none")
    assert found["retry"] == millstream.RetryPolicy(max_attempts=3, backoff=9.0).as_dict()
    assert (found["ttl"], found["lease"], found["capacity"]) == (None, 60.0, 50)
    found = json_of(capfd, "queue", "alter", path, "q", "--capacity", "60", "--no-ageing")
    assert (found["capacity"], found["ageing"]) == (60, False)
    with millstream.open(path, mode="r") as store:
        assert store.queue("q").retry == millstream.RetryPolicy(max_attempts=3, backoff=9.0)
        stats = store.queue("q").stats()
        assert (stats.ttl, stats.ageing, stats.capacity, stats.ordering) == (None, False, 60, "key")
    run(capfd, ["queue", "alter", path, "q", "--capacity", "5"], 3)
    run(capfd, ["queue", "alter", path, "q", "--ttl", "soon"], 2)
    run(capfd, ["queue", "alter", path, "q"], 2)
    run(capfd, ["queue", "create", path, "q"], 3)
    run(capfd, ["queue", "create", path, "q", "--if-not-exists", "--lease", "1m"], 0)
    run(capfd, ["queue", "create", path, "q", "--if-not-exists", "--lease", "2m"], 3)


NONE_BY_DEFAULT = {"--retention-bytes", "--retention-age", "--retention-records", "--ttl"}
NONE_BY_DEFAULT |= {"--ordering", "--dedup-id", "--delay", "--at", "--key", "--header"}


@pytest.mark.parametrize("verb", [("create",), ("queue", "create"), ("queue", "put")])
def test_the_defaults_that_help_says_are_those_of_what_is_made(tmp_path, capfd, verb):
    words = []
    for action in COMMANDS[" ".join(verb)]._actions:
        if action.option_strings and action.nargs is None:
            name = action.option_strings[-1]
            said = re.search(r"\(default: ([^);]*)\)", action.help) if action.help else None
            if action.default is None:
                assert said or name in NONE_BY_DEFAULT, f"{verb}: {name} does not say its default"
            if said and said[1] not in ("none", "0") and not name.startswith("--compact"):
                words += [name, said[1]]
    assert len(words) >= 4
    for store, given in (("named", words), ("unnamed", [])):
        run(capfd, [*verb, tmp_path / store, "x", *(["v"] if verb[-1] == "put" else []), *given], 0)
    shown = ["info"] if verb == ("create",) else ["queue", "info"]
    named, unnamed = (json_of(capfd, *shown, tmp_path / one, "x") for one in ("named", "unnamed"))
    for found in (named, unnamed):
        found.pop("path", None)
        found.pop("oldest_age", None)
    assert named == unnamed


def test_a_setting_is_shown_as_it_can_be_given(path, capfd):
    _, err = run(capfd, ["create", path, "s", "--retention-age", "30d"], 0)
    assert "retention age 2592000," in err[0]


# --- drop -----------------------------------------------------------------------------------------


@pytest.fixture
def full(path):
    with millstream.open(path) as store:
        store.stream("s").append_many([b"a", b"b"])
        store.queue("q").put_many([b"a", b"b", b"c"])
    return path


KINDS = pytest.mark.parametrize("verb, name", [(["drop"], "s"), (["queue", "drop"], "q")])


def there(path):
    with millstream.open(path, mode="r") as store:
        return {*store.streams(), *store.queues()}


@KINDS
def test_nothing_is_dropped_unasked(full, capfd, verb, name):
    out, [line] = run(capfd, [*verb, full, name], 2)
    assert out == ""
    assert "--yes" in line
    assert ("2 records" if name == "s" else "3 messages") in line
    assert there(full) == {"s", "q"}


@KINDS
def test_with_yes_it_is_dropped(full, capfd, verb, name):
    _, [line] = run(capfd, [*verb, full, name, "-y"], 0)
    assert line.startswith("dropped ")
    assert there(full) == {"s", "q"} - {name}
    run(capfd, [*verb, full, name, "--yes"], 3)
    assert json_of(capfd, *verb, full, name, "--if-exists") == {
        "stream" if name == "s" else "queue": name,
        "dropped": False,
    }


@KINDS
@pytest.mark.parametrize(
    "answer, code", [("y\n", 0), ("YES\n", 0), ("n\n", 3), ("\n", 3), ("\x04", 3)]
)
def test_at_a_terminal_it_asks(full, verb, name, answer, code):
    """In a process, whose stdin and stderr are a terminal."""
    process, terminal = at_terminal(*verb, full, name)
    with process, open(terminal, "r+b", buffering=0):
        assert b"Drop " in read_until(terminal, b"[y/N] ")
        os.write(terminal, answer.encode())
        assert (b"not dropped" in read_until(terminal, None)) == (code == 3)
    assert process.returncode == code
    assert there(full) == ({"s", "q"} if code else {"s", "q"} - {name})


# --- what a typo names ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [["append"], ["queue", "put"]])
def test_without_create_nothing_is_made(full, tmp_path, capfd, verb):
    more = ["value"] if "put" in verb else []
    known, typo = ("q", "qq") if "put" in verb else ("s", "ss")
    _, [line] = run(capfd, [*verb, full, typo, *more, "--no-create"], 3)
    assert f"there are: {known}; did you mean '{known}'?" in line
    run(capfd, [*verb, tmp_path / "other", known, *more, "--no-create"], 3)
    assert os.listdir(tmp_path) == ["store"]
    assert there(full) == {"s", "q"}
    run(capfd, [*verb, full, known, *more, "--no-create"], 0)
    _, err = run(capfd, [*verb, full, typo, *more], 0)
    assert any("is new; there is" in line for line in err)
    assert there(full) == {"s", "q", typo}


def test_errors_advise_what_one_types(path, capfd):
    """They told a shell to call alter(), or to open with on_mismatch="alter"."""
    run(capfd, ["create", path, "s", "--partitions", "2"], 0)
    run(capfd, ["queue", "create", path, "q"], 0)
    for words in (
        ["create", path, "s", "--if-not-exists", "--partitions", "3"],
        ["queue", "create", path, "q", "--if-not-exists", "--lease", "2m"],
    ):
        _, err = run(capfd, words, 3)
        assert "millstream alter" in err[-1], err
        assert "alter()" not in err[-1] and "on_mismatch" not in err[-1]


def test_counts_and_partitions_that_cannot_be_are_refused_alike(path, capfd):
    run(capfd, ["create", path, "s"], 0)
    for count in ("0", "-1", "x"):
        run(capfd, ["add-partitions", path, "s", count], 2)
    _, err = run(capfd, ["append", path, "s", "-p", "77"], 3)
    assert "partition 77" in err[-1]


def test_limits_in_messages_are_plain_numbers(path, capfd):
    _, err = run(capfd, ["queue", "create", path, "q", "--lease", "99999999"], 3)
    assert "2,592,000" in err[-1]
