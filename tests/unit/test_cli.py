"""The command line as its users meet it: in processes of its own, through pipes."""

import base64
import fcntl
import itertools
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from timing import until

import millstream
from millstream.cli import main
from millstream.cli.formats import Record, compile_format, timestamp_text
from millstream.cli.output import (
    Column,
    Output,
    age_text,
    fields_of,
    fit,
    fold,
    plural,
    rate_text,
    rows_of,
    seconds_text,
    size_text,
)

COMMAND = [sys.executable, "-m", "millstream"]
VERBS = (
    "ls",
    "info",
    "append",
    "cat",
    "tail",
    "verify",
    "repair",
    "dump",
    "backup",
    "bench",
    "demo",
)


def run(*args, input=b"", code=0, **options):
    """Run one command, hold it to its exit code, and return it; a traceback is never right."""
    words = [*COMMAND, *map(str, args)]
    done = subprocess.run(words, input=input, capture_output=True, timeout=600, **options)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    return done


def refusal(*args, code=3, **options):
    """Run a command that is refused, and return the one line that says why."""
    done = run(*args, code=code, **options)
    lines = done.stderr.decode().splitlines()
    assert done.stdout == b""
    assert len(lines) == 1, lines
    assert lines[0].startswith("millstream: ")
    return lines[0]


def json_of(*args, **options):
    return json.loads(run(*args, "--json", **options).stdout)


def start(*args, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def end(process):
    """Return what is left of a process's output once it has ended."""
    out, err = process.communicate(timeout=600)
    assert b"Traceback" not in err, err
    return out, err


@pytest.fixture
def store(tmp_path):
    """The path of a store with one stream of one partition, `letters`: a to z."""
    path = tmp_path / "store"
    with millstream.open(path) as opened:
        letters = opened.stream("letters", partitions=1)
        values = [bytes([code]) for code in range(ord("a"), ord("z") + 1)]
        letters.append_many(values, timestamps=[number * 1_000_000 for number in range(26)])
    return path


@pytest.fixture
def keyed(tmp_path):
    """The path of a store with one stream of four partitions, `numbers`: 0 to 99, by time."""
    path = tmp_path / "keyed"
    with millstream.open(path) as opened:
        numbers = opened.stream("numbers", partitions=4)
        for number in range(100):
            text = b"%d" % number
            numbers.append(text, key=b"key%d" % (number % 10), timestamp=number * 1_000_000)
    return path


# --- the program --------------------------------------------------------------------------------


def test_version_and_help_say_what_they_should():
    assert run("--version").stdout.decode() == f"millstream {millstream.__version__}\n"
    listed = run("--help").stdout.decode()
    for verb in VERBS:
        assert verb in listed
        assert b"usage: millstream " + verb.encode() in run(verb, "--help").stdout


def test_usage_errors_end_with_2():
    run(code=2)
    run("nonsense", code=2)
    run("cat", code=2)
    run("cat", "store", "stream", "-o", "yesterday", code=2)
    run("cat", "store", "stream", "-o", "0001-01-01T00:00+14:00", code=2)
    run("cat", "store", "stream", "-f", "%y", code=2)
    run("cat", "store", "stream", "-n", "-1", code=2)
    run("append", "store", "stream", "--header", "novalue", code=2)
    run("append", "store", "stream", "-k", "", code=2)
    run("bench", "--size", "huge", code=2)


def test_import_of_the_command_line_loads_neither_numpy_nor_rich():
    code = "import sys, millstream.cli; print([m for m in ('numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_main_returns_codes_in_process(store, capsys):
    assert main(["ls", str(store), "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["letters"]
    assert main(["ls", str(store / "no")]) == 3
    assert capsys.readouterr().err.startswith("millstream: ")
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    "verb", ["ls", "info", "cat", "tail", "verify", "repair", "dump", "backup"]
)
def test_missing_store_is_refused_and_not_made(tmp_path, verb):
    missing = tmp_path / "missing"
    more = {"cat": ["s"], "tail": ["s"], "backup": [tmp_path / "copy"]}.get(verb, [])
    assert "missing" in refusal(verb, missing, *more)
    assert not missing.exists()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("verb", ["ls", "cat", "verify", "append"])
def test_file_in_place_of_a_store_is_refused(tmp_path, verb):
    path = tmp_path / "file"
    path.write_bytes(b"precious")
    refusal(verb, path, *{"cat": ["s"], "append": ["s"]}.get(verb, []))
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("verb", ["ls", "cat", "verify"])
def test_directory_that_is_no_store_is_refused(tmp_path, verb):
    (tmp_path / "notes.txt").write_bytes(b"precious")
    refusal(verb, tmp_path, *{"cat": ["s"]}.get(verb, []))
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("verb", ["info", "cat", "tail", "verify", "dump"])
def test_missing_stream_is_refused_and_not_made(store, verb):
    assert "nosuch" in refusal(verb, store, "nosuch")
    with millstream.open(store, mode="r") as opened:
        assert list(opened.streams()) == ["letters"]


@pytest.mark.parametrize(
    "name", ["..", "../evil", "a/b", "", "a\nb", "\x1b[31mred", "x" * 300, "é"]
)
def test_hostile_names_are_refused_on_one_printable_line(tmp_path, store, name):
    for verb in ("append", "cat", "verify"):
        line = refusal(verb, store, name, input=b"x\n")
        assert line.isprintable()
    assert os.listdir(tmp_path) == ["store"]
    assert [entry["name"] for entry in json_of("ls", store)] == ["letters"]


# --- append -------------------------------------------------------------------------------------


def test_append_then_cat_gives_the_lines_back(tmp_path):
    path = tmp_path / "new"
    done = run("append", path, "s", input=b"one\ntwo\n\nlast without an end")
    assert done.stdout == b""
    assert b"4 records appended" in done.stderr
    assert run("cat", path, "s").stdout == b"one\ntwo\n\nlast without an end\n"
    assert json_of("append", path, "s", input=b"five\n") == {"appended": 1, "partitions": {"0": 1}}
    assert json_of("append", path, "s", input=b"") == {"appended": 0, "partitions": {}}


def test_binary_records_survive_both_ways(tmp_path):
    path = tmp_path / "new"
    values = [bytes(range(1, 256)), b"\xff\xfe", b"a\nb", b""]
    run("append", "-0", path, "s", input=b"".join(value + b"\0" for value in values))
    assert run("cat", "-z", path, "s").stdout == b"".join(value + b"\0" for value in values)
    objects = [json.loads(line) for line in run("cat", path, "s", "--json").stdout.splitlines()]
    assert base64.b64decode(objects[0]["value"]["base64"]) == values[0]
    assert [thing["value"] for thing in objects[2:]] == ["a\nb", ""]


def test_append_reads_keys_headers_and_tombstones(tmp_path):
    path = tmp_path / "new"
    options = ["-k", "::", "-Z", "--header", "src=test", "--header", "n=1=2", "--partitions", "3"]
    run("append", path, "s", *options, input=b"k1::v1\nk2::\nno key\n::empty key\n")
    lines = run("cat", path, "s", "--json").stdout.splitlines()
    found = {(thing["key"], thing["value"]) for thing in map(json.loads, lines)}
    assert found == {("k1", "v1"), ("k2", None), (None, "no key"), ("", "empty key")}
    assert all(json.loads(line)["headers"] == {"src": "test", "n": "1=2"} for line in lines)
    run("append", path, "s", "--key", "fixed", "--durability", "sync", input=b"x\n")
    with millstream.open(path, mode="r") as opened:
        stream = opened.stream("s")
        assert stream.partitions == 3
        where = stream.partition_for(b"fixed")
    assert b"fixed x" in run("cat", path, "s", "-p", where, "-f", "%k %s\n").stdout


def test_append_with_a_producer_adds_the_same_input_once(tmp_path):
    path = tmp_path / "new"
    options = ("--producer", "import", "--partitions", "2")
    first = json_of("append", path, "s", *options, input=b"a\nb\nc\n")
    assert first == {"appended": 3, "resent": 0, "partitions": {"0": 2, "1": 1}}
    again = json_of("append", path, "s", "--producer", "import", input=b"a\nb\nc\nd\n")
    assert again == {"appended": 1, "resent": 3, "partitions": {"1": 1}}
    done = run(
        "append", path, "s", "--producer", "import", "--first-sequence", "3", input=b"d\ne\n"
    )
    assert b"1 record appended, 1 re-send left out" in done.stderr
    assert sorted(run("cat", path, "s").stdout.split()) == [b"a", b"b", b"c", b"d", b"e"]
    assert "--producer" in refusal("append", path, "s", "--first-sequence", "3")
    dumped = [json.loads(line) for line in run("dump", path, "s", "--json").stdout.splitlines()]
    assert dumped[0] == {"item": "producer", "stream": "s", "number": 1, "id": "import"}
    batches = [thing for thing in dumped if thing["item"] == "batch"]
    assert {(thing["producer"], thing["sequence"]) for thing in batches} >= {(1, 4)}
    assert json_of("verify", path)["well"]


def test_append_to_one_partition_and_to_none(keyed):
    counts = json_of("append", keyed, "numbers", "-p", "2", input=b"a\nb\n")
    assert counts == {"appended": 2, "partitions": {"2": 2}}
    refusal("append", keyed, "numbers", "--partitions", "5", input=b"x\n")
    done = run("append", keyed, "numbers", "-p", "4", input=b"x\n", code=3)
    assert b"partitions 0 to 3" in done.stderr


def test_append_shows_records_before_stdin_ends(tmp_path):
    path = tmp_path / "new"
    producer = start("append", path, "s", stdin=subprocess.PIPE)
    producer.stdin.write(b"first\nhalf of the sec")
    producer.stdin.flush()
    until(lambda: path.exists() and b"first" in cat_or_nothing(path))
    assert cat_or_nothing(path) == b"first\n"
    producer.stdin.write(b"ond\n")
    producer.stdin.close()
    producer.stdin = None
    _, err = end(producer)
    assert b"2 records appended" in err
    assert cat_or_nothing(path) == b"first\nhalf of the second\n"


def cat_or_nothing(path):
    done = subprocess.run([*COMMAND, "cat", path, "s"], capture_output=True, timeout=600)
    return done.stdout if done.returncode == 0 else b""


def test_append_takes_more_than_a_pipe_holds(tmp_path):
    path = tmp_path / "new"
    lines = [b"%d %s" % (number, b"x" * (number % 2000)) for number in range(20_000)]
    lines[777] = b"long" * 500_000
    text = b"\n".join(lines) + b"\n"
    assert json_of("append", path, "s", input=text)["appended"] == len(lines)
    assert run("cat", path, "s").stdout == text


def test_append_interrupted_says_how_much_is_in(tmp_path):
    path = tmp_path / "new"
    producer = start("append", path, "s", stdin=subprocess.PIPE)
    producer.stdin.write(b"first\n")
    producer.stdin.flush()
    until(lambda: path.exists() and cat_or_nothing(path) == b"first\n")
    producer.send_signal(signal.SIGINT)
    _, err = end(producer)
    assert producer.returncode == 130
    assert b"1 record appended" in err


HIT = """
import os, signal, sys
from millstream.cli import main
from millstream.streams.stream import Stream

unhit = Stream.append_many

def hit(*arguments, **named):
    spans = unhit(*arguments, **named)
    os.kill(os.getpid(), signal.SIGINT)
    return spans

Stream.append_many = hit
sys.exit(main(sys.argv[1:]))
"""


def test_append_interrupted_between_a_record_and_its_count_counts_it(tmp_path):
    """Ctrl-C that came as a record was in, and not yet counted, made it "0 records appended"."""
    command = [sys.executable, "-c", HIT, "append", tmp_path / "new", "s"]
    done = subprocess.run(command, input=b"first\n", capture_output=True, timeout=600)
    assert done.returncode == 130
    assert b"1 record appended" in done.stderr


def test_append_that_ignores_ctrl_c_goes_on_ignoring_it(tmp_path):
    """As a shell starts what is to run in the background."""
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN){HIT}"
    command = [sys.executable, "-c", ignoring, "append", tmp_path / "new", "s"]
    done = subprocess.run(command, input=b"first\n", capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"1 record appended\n")


# --- cat and tail -------------------------------------------------------------------------------


def test_cat_starts_where_it_is_told(store):
    def cat(*options):
        return run("cat", store, "letters", *options).stdout.replace(b"\n", b"").decode()

    assert cat() == cat("-e") == "abcdefghijklmnopqrstuvwxyz"
    assert cat("-o", "23") == cat("-p", "0", "-o", "23") == "xyz"
    assert cat("-o", "-2", "-e") == "yz"
    assert len(cat("-o", "-1000")) == 26
    assert cat("-o", "earliest", "-n", "3") == cat("-o", "beginning", "-c", "3") == "abc"
    assert cat("-o", "latest") == cat("-o", "26") == cat("-n", "0") == ""
    assert cat("-o", "1970-01-01T00:00:24Z") == cat("-o", "1970-01-01T01:00:24+01:00") == "yz"
    assert cat("-o", "-5", "-n", "2") == "vw"


def test_cat_refuses_what_is_not_there(store):
    assert "26" in refusal("cat", store, "letters", "-p", "0", "-o", "27")
    refusal("cat", store, "letters", "-p", "1")


def test_cat_of_all_partitions_keeps_each_in_order(keyed):
    lines = run("cat", keyed, "numbers", "-f", "%p %o %s\n").stdout.decode().splitlines()
    assert len(lines) == 100
    for partition in "0123":
        mine = [tuple(map(int, line.split())) for line in lines if line[0] == partition]
        assert [offset for _, offset, _ in mine] == list(range(len(mine)))
        assert [number for *_, number in mine] == sorted(number for *_, number in mine)
        only = run("cat", keyed, "numbers", "-p", partition, "-f", "%o,").stdout.decode()
        assert only == "".join(f"{offset}," for _, offset, _ in mine)
    tens = run("cat", keyed, "numbers", "-o", "10", "-f", "%o\n").stdout.split()
    assert tens
    assert min(map(int, tens)) == 10


def test_last_records_of_all_partitions_are_merged_by_time(keyed):
    last = [b"%d" % number for number in range(100)]
    assert run("tail", keyed, "numbers").stdout.split() == last[-10:]
    assert run("tail", keyed, "numbers", "-n", "37").stdout.split() == last[-37:]
    assert run("tail", keyed, "numbers", "-n", "0").stdout == b""
    assert run("cat", keyed, "numbers", "-o", "-1000").stdout.split() == last
    assert run("cat", keyed, "numbers", "-o", "-3").stdout.split() == last[-3:]


def test_formats_are_those_of_kcat(tmp_path):
    path = tmp_path / "new"
    with millstream.open(path) as opened:
        stream = opened.stream("s", partitions=1)
        stream.append(b"value", key=b"key", headers={"a": b"1", "b": b"2"}, timestamp=1_234_567)
        stream.append(None, key=b"gone", timestamp=2_000_000)
    form = r"%t[%p]@%o %T %k(%K)=%s(%S) %h 100%%\t\x41\\\n"
    assert run("cat", path, "s", "-f", form).stdout == (
        b"s[0]@0 1234 key(3)=value(5) a=1,b=2 100%\tA\\\ns[0]@1 2000 gone(4)=(-1)  100%\tA\\\n"
    )
    first, second = map(json.loads, run("cat", path, "s", "-J").stdout.splitlines())
    assert first == {
        "stream": "s",
        "partition": 0,
        "offset": 0,
        "timestamp": "1970-01-01T00:00:01.234567Z",
        "key": "key",
        "value": "value",
        "headers": {"a": "1", "b": "2"},
    }
    assert second["value"] is None
    assert run("cat", path, "s", "-o", second["timestamp"], "-f", "%k").stdout == b"gone"


def test_reader_that_goes_away_ends_cat_quietly(tmp_path):
    path = tmp_path / "new"
    with millstream.open(path) as opened:
        opened.stream("s").append_many([b"x" * 100] * 50_000)
    for options in ([], ["--json"], ["-f", "%s\n"]):
        process = start("cat", path, "s", *options)
        assert process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        process.wait(timeout=600)
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.returncode == 141


def test_full_disk_behind_stdout_is_a_failure(store):
    with open("/dev/full", "wb") as full:
        words = [*COMMAND, "cat", store, "letters"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=600)
    assert done.returncode == 4
    assert done.stderr == b"millstream: No space left on device\n"


@pytest.mark.parametrize(
    "verb",
    ["cat {} letters", "ls {}", "info --json {}", "dump {}", "ls --help"],
)  # fmt: skip
def test_closed_stdout_is_a_failure_and_no_file_of_the_store_takes_its_place(store, verb):
    words = f"{sys.executable} -m millstream {verb.format(store)} >&-"
    done = subprocess.run(["sh", "-c", words], stderr=subprocess.PIPE, timeout=600)
    assert (done.returncode, done.stderr) == (4, b"millstream: stdout is closed\n")
    json_of("verify", store)


def test_closed_stdout_is_no_failure_of_a_command_that_prints_nothing(tmp_path):
    words = f"{sys.executable} -m millstream create --json {tmp_path}/new s >&-"
    printed = subprocess.run(["sh", "-c", words], stderr=subprocess.PIPE, timeout=600)
    assert printed.returncode == 4
    words = f"{sys.executable} -m millstream append {tmp_path}/new s >&- 2>/dev/null"
    assert subprocess.run(["sh", "-c", words], input=b"x\n", timeout=600).returncode == 0
    with millstream.open(tmp_path / "new", mode="r") as new:
        assert new.stream("s").next_offset(0) == 1


@pytest.mark.parametrize("partitions", [1, 4])
def test_tail_follows_until_it_is_interrupted(tmp_path, partitions):
    path = tmp_path / "new"
    with millstream.open(path) as opened:
        stream = opened.stream("s", partitions=partitions)
        for number in range(3):
            stream.append(b"old%d" % number, partition=number % partitions)
    # Nobody else has the store open: the one who tails must still see those who come.
    process = start("tail", "-f", path, "s")
    assert [process.stdout.readline() for _ in range(3)] == [b"old0\n", b"old1\n", b"old2\n"]
    for number in range(8):
        line = b"new%d\n" % number
        run("append", path, "s", "-p", number % partitions, input=line)
        assert process.stdout.readline() == line
    process.send_signal(signal.SIGINT)
    out, err = end(process)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_tail_ends_when_nobody_reads_it_any_more(tmp_path):
    """`tail -f STORE s | head -1` stayed until the next record, which may never come."""
    path = tmp_path / "new"
    with millstream.open(path) as opened:
        opened.stream("s").append_many([b"1", b"2"])
    process = start("tail", "-f", path, "s")
    assert process.stdout.readline() == b"1\n"
    process.stdout.close()
    assert process.wait(600) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    with millstream.open(path) as opened:
        assert opened.session.clean  # it has closed the store


# --- ls, info -----------------------------------------------------------------------------------


def test_ls_lists_streams(keyed):
    run("append", keyed, "alpha", input=b"x\n")
    listed = json_of("ls", keyed)
    assert [(entry["name"], entry["partitions"], entry["records"]) for entry in listed] == [
        ("alpha", 1, 1),
        ("numbers", 4, 100),
    ]
    lines = run("ls", keyed).stdout.decode().splitlines()
    assert lines[0].split()[:3] == ["Stream", "Partitions", "Records"]
    assert lines[1].split()[:3] == ["alpha", "1", "1"]
    assert lines[2].split()[:3] == ["numbers", "4", "100"]


def test_ls_of_an_empty_store_is_an_empty_list(tmp_path):
    with millstream.open(tmp_path / "empty"):
        pass
    assert json_of("ls", tmp_path / "empty") == []
    run("ls", tmp_path / "empty")


def test_info_shows_each_partition(keyed):
    found = json_of("info", keyed, "numbers")
    assert found["durability"] == "interval"
    (stream,) = found["streams"]
    assert stream["name"] == "numbers"
    assert [part["partition"] for part in stream["partitions"]] == [0, 1, 2, 3]
    assert sum(part["next_offset"] - part["first_offset"] for part in stream["partitions"]) == 100
    text = run("info", keyed).stdout.decode()
    assert "numbers" in text
    assert "interval" in text


# --- verify, repair, dump, backup, bench --------------------------------------------------------


def flip(store):
    """Flip a byte of the one batch of `letters`."""
    for path in Path(store).rglob("*"):
        if path.is_file() and b"abcdefghijklm" in (data := path.read_bytes()):
            with open(path, "r+b") as file:
                file.seek(data.index(b"abcdefghijklm"))
                file.write(b"X")
            return path
    raise AssertionError("no such batch")


def test_verify_passes_a_good_store(store):
    found = json_of("verify", store)
    assert (found["well"], found["records"], found["problems"]) == (True, 26, [])
    assert b"no problems" in run("verify", store, "letters").stdout


def test_verify_finds_a_flipped_byte_and_ends_with_1(store):
    path = flip(store)
    found = json_of("verify", store, code=1)
    assert found["well"] is False
    assert any(problem["path"] == str(path) for problem in found["problems"])
    done = run("verify", store, code=1)
    assert str(path).encode() in done.stdout


def test_corrupt_batch_ends_cat_with_4_and_one_line(store):
    path = flip(store)
    line = refusal("cat", store, "letters", code=4)
    assert path.name in line


def test_repair_says_what_it_would_do_and_does_it(store):
    assert json_of("repair", store) == {"dry_run": False, "actions": []}
    flip(store)
    planned = json_of("repair", store, "--dry-run")
    assert planned["actions"]
    json_of("verify", store, code=1)
    assert len(json_of("repair", store)["actions"]) == len(planned["actions"])
    json_of("verify", store)
    run("cat", store, "letters")


def test_dump_prints_what_the_files_hold(store):
    assert run("dump", store).stdout.strip()
    lines = run("dump", store, "letters", "-p", "0", "--json").stdout.splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_backup_makes_a_copy_and_refuses_to_replace_one(store, tmp_path):
    copy = tmp_path / "copy"
    assert json_of("backup", store, copy) == {"target": str(copy)}
    assert run("cat", copy, "letters").stdout == run("cat", store, "letters").stdout
    refusal("backup", store, copy)


def test_bench_measures_with_several_processes(tmp_path):
    options = ["--records", "2000", "--batch", "100", "--processes", "2", "--dir", tmp_path]
    options += ["--rounds", "1"]
    found = json_of("bench", *options)
    assert all(result["records_per_second"] > 0 for result in found["results"])
    assert any("2 processes" in result["what"] for result in found["results"])
    assert found["machine"]["cores"] >= 1
    assert list(tmp_path.iterdir()) == []
    text = run("bench", "--records", "500", "--size", "1KiB", "--durability", "interval").stdout
    assert b"interval" in text
    assert max(map(len, text.decode().splitlines()[3:])) <= 100


def test_bench_says_how_far_rounds_lie_apart():
    found = json_of("bench", "--records", "200", "--rounds", "2")
    assert found["rounds"] == 2
    for one in found["results"]:
        rates = one["records_per_second_of_rounds"]
        assert len(rates) == 2 and one["records_per_second"] in rates
    for one in found["latencies"]:
        shares = list(one["seconds"].values())
        assert one["calls"] == 200 and shares == sorted(shares) and shares[0] > 0
    sizes = {one["value_bytes"] for one in found["growth"]}
    assert sizes == {10**power for power in range(1, 7)}
    assert all(min(one["bytes_per_second_of_rounds"]) > 0 for one in found["growth"])
    text = run("bench", "--records", "200", "--rounds", "2").stdout.decode()
    assert "Spread" in text and not set(text) & set("█▓░")  # a pipe gets the table alone


def test_bench_draws_bars_on_a_terminal():
    process, end = at_terminal("bench", "--records", "200", "--rounds", "2")
    text = read_until(end, None).decode()
    os.close(end)
    assert process.wait() == 0
    for title in ("Appends", "Reads", "How long one call takes", "Growth with the size of a value"):
        assert title in text
    lines = [line for line in text.splitlines() if line.startswith("p50")]
    assert len(lines) == 1 and set(lines[0]) & set("█▓░")


def test_bench_writes_plots(tmp_path):
    pytest.importorskip("matplotlib")
    plots = tmp_path / "new" / "plots"
    found = json_of("bench", "--records", "200", "--rounds", "1", "--svg", plots)
    names = ["appends.svg", "reads.svg", "latency.svg", "growth.svg"]
    assert [Path(file).name for file in found["svg"]] == names
    assert {file.name for file in plots.iterdir()} == {*names}
    assert all("</svg>" in file.read_text() for file in plots.iterdir())


def test_bench_names_the_extra_before_it_measures(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['matplotlib'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'matplotlib' else find(name, *more)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [*COMMAND, "bench", "--svg", str(tmp_path / "plots")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 3 and "pip install 'millstream[plots]'" in done.stderr
    assert not done.stdout and not (tmp_path / "plots").exists()


# --- terminals ----------------------------------------------------------------------------------


def at_terminal(*args):
    """Start a command whose stdin, stdout and stderr are a terminal; return it with our end."""
    ours, theirs = os.openpty()
    words = [*COMMAND, *map(str, args)]
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    return process, ours


def read_until(terminal, end):
    """Read what a terminal shows, up to some bytes, or to its end."""
    shown = b""
    while end is None or end not in shown:
        assert select.select([terminal], [], [], 60)[0], shown
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # all who wrote there have ended
            chunk = b""
        if not chunk:
            assert end is None, shown
            break
        shown += chunk
    return shown


def on_terminal(*words, columns=80, term="xterm-256color"):
    """Run a command on a terminal of its own; return its exit code and what it showed."""
    main_end, their_end = os.openpty()
    fcntl.ioctl(their_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [*map(str, words)],
        stdin=their_end,
        stdout=their_end,
        stderr=their_end,
        env={**env, "TERM": term},
    )
    os.close(their_end)
    shown = b""
    while True:
        try:
            chunk = os.read(main_end, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(main_end)
    return process.wait(timeout=600), shown.decode()


def test_tables_on_a_terminal_are_painted_and_fit(keyed):
    pytest.importorskip("rich")
    code, shown = on_terminal(*COMMAND, "info", keyed)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert code == 0
    assert "\x1b[" in shown
    assert "───" in plain
    table = plain[plain.index("Partition") :]
    assert max(map(len, table.splitlines())) <= 80


def test_terminal_without_rich_or_colours_gets_plain_text(keyed):
    code, shown = on_terminal(*COMMAND, "verify", keyed, term="dumb")
    assert (code, "\x1b" in shown) == (0, False)
    assert "100 records" in shown
    script = (
        "import sys; sys.modules['rich'] = None; import millstream.cli as c; sys.exit(c.main())"
    )
    code, shown = on_terminal(sys.executable, "-c", script, "info", keyed)
    assert (code, "\x1b" in shown) == (0, False)
    assert "Partition" in shown


# --- words --------------------------------------------------------------------------------------


def test_texts_for_people():
    assert [size_text(size) for size in (0, 1023, 1024, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
    ]
    assert [rate_text(count, 1) for count in (5, 12_345, 27.44e6, 999_999)] == [
        "5.0/s",
        "12.3 k/s",
        "27.4 M/s",
        "1.0 M/s",
    ]
    assert [seconds_text(s) for s in (2, 0.0123, 0.0000123, 37e-9)] == [
        "2.00 s",
        "12.3 ms",
        "12.3 us",
        "37.0 ns",
    ]
    assert [plural(1, "batch"), plural(2000, "batch"), plural(0, "record")] == [
        "1 batch",
        "2,000 batches",
        "0 records",
    ]
    assert [age_text(s) for s in (None, 0.5, 61, 7200, 90061)] == [
        "-",
        "0 s",
        "1 min 1 s",
        "2 h",
        "1 d 1 h",
    ]


def test_bars_have_eighths_and_never_overflow():
    output = Output()
    output.blocks = "█▉▊▋▌▍▎▏"
    assert output.bar(1.5, 4) == "████"
    assert output.bar(0.5, 1) == "▌"
    assert output.bar(0, 4) == ""
    assert output.bar(1 / 8, 1) == "▏"
    assert output.bar(7 / 8, 1) == "▉"
    output.blocks = ""
    assert output.bar(0.5, 4) == "##"


def texts(lines):
    """The lines of a table, without their styles."""
    return ["".join(text for text, _ in line) for line in lines]


def test_a_table_aligns_folds_its_prose_and_becomes_fields_where_it_does_not_fit():
    columns = [Column("a", prose=True), Column("n", right=True)]
    cells = [["xyz uvw", "1"], ["", "1,000"]]

    def rows(width):
        widths = fit(columns, cells, width)
        return None if widths is None else texts(rows_of(columns, cells, widths, rule=False))

    assert rows(None) == rows(14) == ["a            n", "xyz uvw      1", "         1,000"]
    assert rows(13) == [
        "a           n",
        "xyz         1",
        "uvw",
        "        1,000",
    ]
    assert rows(10) == ["a        n", "xyz      1", "uvw", "     1,000"]
    assert rows(9) is None
    assert texts(fields_of(columns, cells, 9)) == [
        "a    xyz",
        "     uvw",
        "  n  1",
        "a",
        "  n  1,000",
    ]
    assert fit([Column("宽")], [["好好"]], None) == [4]


def test_lines_are_folded_between_words_and_keep_their_indent():
    assert fold("", 5) == [""]
    assert fold("  one two three", 9) == ["  one two", "  three"]
    assert fold("1234567890 1", 5) == ["1234567890", "1"]


def test_timestamps_of_any_year_are_written():
    assert timestamp_text(0) == "1970-01-01T00:00:00.000000Z"
    assert timestamp_text(-1) == "1969-12-31T23:59:59.999999Z"
    assert timestamp_text((1 << 63) - 1).startswith("294247-")


def test_format_with_a_lone_percent_or_backslash_is_refused():
    record = Record(0, 0, 0, None, b"v", {})
    for text in ("%", "\\", r"\q", "%é", "%{open"):
        with pytest.raises(ValueError, match="unknown token"):
            compile_format(text, "s")
    assert compile_format("é%s", "s")(record) == "é".encode() + b"v"


def test_format_of_a_field_of_a_value():
    write = compile_format("%{a}|%{b}|%{none}", "s")
    values = {
        b'{"a": "\xc3\xa4", "b": [1, "\xc3\xa4"]}': 'ä|[1, "ä"]|'.encode(),
        b"[1]": b"||",
        b"no JSON": b"||",
        b"": b"||",
        None: b"||",
    }
    for value, written in values.items():
        assert write(Record(0, 0, 0, None, value, {})) == written


# --- what retention was faster than ---------------------------------------------------------------


@pytest.fixture
def short(tmp_path):
    """A store whose stream `s` of two partitions has lost its first records of partition 0."""
    path = tmp_path / "short"
    with millstream.open(path) as opened:
        stream = opened.stream("s", partitions=2, segment_bytes="64KiB")
        for number in range(40):
            stream.append_many([b"%02d" % number + b"x" * 1000] * 10, partition=0)
        stream.append_many([b"other"] * 5, partition=1)
        stream.delete_before(millstream.Position(0, 1, 390))
        first = stream.first_offset(0)
    assert 0 < first < 390
    return path, first


def test_cat_of_an_offset_beyond_the_range_ends_with_3(short):
    path, _ = short
    assert "401" in refusal("cat", path, "s", "-p", "0", "-o", "401")
    assert "401" in refusal("cat", path, "s", "-o", "401")
    assert "401" in refusal("cat", path, "s", "-o", "401", "--on-lost", "earliest")
    assert run("cat", path, "s", "-o", "400").stdout == b""
    run("create", path, "empty")
    assert "there is no record, the next will be 0" in refusal("cat", path, "empty", "-o", "1")
    assert run("cat", path, "s", "-p", "1", "-o", "4").stdout == b"other\n"
    assert run("cat", path, "s", "-o", "399").stdout.startswith(b"39x")


def test_cat_says_what_retention_took(short):
    path, first = short
    for options in (["-p", "0"], []):
        assert f"there are offsets {first} to 399" in refusal("cat", path, "s", "-o", "1", *options)
    done = run("cat", path, "s", "-o", "1", "--on-lost", "earliest", "-f", "%p %o\n")
    lines = done.stdout.decode().splitlines()
    assert lines == [f"0 {n}" for n in range(first, 400)] + [f"1 {n}" for n in range(1, 5)]
    assert done.stderr.decode() == (
        f"millstream: partition 0: retention removed offsets 1 to {first - 1} before they were"
        " read\n"
    )
    assert run("cat", path, "s").stderr == b""


@pytest.mark.parametrize("on_lost", ["earliest", "raise"])
def test_tail_that_retention_overtakes_says_so_and_goes_on(tmp_path, on_lost):
    path = tmp_path / "new"
    options = [] if on_lost == "earliest" else ["--on-lost", "raise"]
    with millstream.open(path) as opened:
        stream = opened.stream("s", segment_bytes="64KiB")
        stream.append(b"begin")
        process = start("tail", "-f", path, "s", *options, "--format", "%o %s\n")
        assert process.stdout.readline() == b"0 begin\n"
        for _ in range(60):  # far more than its pipe holds
            stream.append_many([b"x" * 1000] * 60)
        stream.delete_before(millstream.Position(0, 1, stream.next_offset(0)))
        first = stream.first_offset(0)
        stream.append(b"end")
        offsets = [0]
        for line in process.stdout:
            offsets.append(int(line.split()[0]))
            if line.endswith(b" end\n"):
                process.send_signal(signal.SIGINT)
        _, err = end(process)
    gaps = [(a, b) for a, b in itertools.pairwise(offsets) if b != a + 1]
    if on_lost == "raise":
        assert process.returncode == 3
        assert gaps == []
        assert b"was removed by retention" in err
        return
    assert process.returncode == 130
    [(last, next_)] = gaps
    assert next_ == first
    assert err.decode() == (
        f"millstream: partition 0: retention removed offsets {last + 1} to {first - 1} before they"
        " were read\n"
    )
