"""Every command, found by walking the parser: exit codes, what stdout holds, what help says."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_cli import at_terminal, read_until

import millstream
from millstream.cli import build_parser, main


def leaves(parser, words=()):
    """Yield (words, parser) of each command."""
    below = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not below:
        yield " ".join(words), parser
    for name, one in (pair for action in below for pair in action.choices.items()):
        yield from leaves(one, (*words, name))


COMMANDS = dict(leaves(build_parser()))
POSITIONALS = {
    words: [one.dest for one in parser._actions if not one.option_strings]
    for words, parser in COMMANDS.items()
}
OF_A_STORE = [words for words, dests in POSITIONALS.items() if "store" in dests]
MAKE = {"append", "create", "queue put", "queue create"}  # a store, and what is named in it
NAMES = {
    "stream": ("letters", "lettres"),
    "queue": ("mail", "mial"),
    "group": ("readers", "readres"),
}
NAMING = [(w, n) for w in OF_A_STORE for n in NAMES if n in POSITIONALS[w] and w not in MAKE]

VALID = {
    "create": ["STORE", "letters", "--if-not-exists"],
    "alter": ["STORE", "letters", "--retention-age", "7d"],
    "add-partitions": ["STORE", "letters", "2"],
    "drop": ["STORE", "letters", "--yes"],
    "queue create": ["STORE", "mail", "--if-not-exists"],
    "queue alter": ["STORE", "mail", "--lease", "1m"],
    "queue drop": ["STORE", "mail", "--yes"],
    "ls": ["STORE"],
    "info": ["STORE"],
    "append": ["STORE", "letters"],
    "cat": ["STORE", "letters"],
    "tail": ["STORE", "letters"],
    "groups ls": ["STORE"],
    "groups info": ["STORE", "letters", "readers"],
    "groups lag": ["STORE", "letters", "readers"],
    "groups seek": ["STORE", "letters", "readers", "earliest"],
    "groups rm": ["STORE", "letters", "readers"],
    "queue put": ["STORE", "mail", "one more"],
    "queue get": ["STORE", "mail"],
    "queue ls": ["STORE"],
    "queue info": ["STORE", "mail"],
    "queue peek": ["STORE", "mail"],
    "queue cancel": ["STORE", "mail", "READY"],
    "queue pause": ["STORE", "mail"],
    "queue resume": ["STORE", "mail"],
    "queue dead ls": ["STORE", "mail"],
    "queue dead redrive": ["STORE", "mail", "DEAD"],
    "queue dead purge": ["STORE", "mail", "DEAD"],
    "queue bench": ["--messages", "50", "--rounds", "1"],
    "work": ["test_cli_walk:do_nothing", "STORE", "mail", "--until-empty"],
    "advise": ["STORE"],
    "metrics": ["STORE"],
    "verify": ["STORE"],
    "repair": ["STORE"],
    "dump": ["STORE"],
    "backup": ["STORE", "COPY"],
    "compact": ["STORE", "letters"],
    "bench": ["--records", "50", "--rounds", "1"],
    "relay": ["STORE", "letters", "nats://127.0.0.1:1"],
    "top": ["STORE"],
    "web": ["STORE"],
}
GO_ON = {"relay", "top", "web"}  # until they are ended: they have tests of their own
UNTABLED = {
    *("append", "cat", "tail", "groups rm", "groups seek", "groups lag", "queue put", "queue get"),
    *("queue cancel", "queue pause", "queue resume", "queue dead redrive", "queue dead purge"),
    *("create", "alter", "add-partitions", "drop", "queue create", "queue alter", "queue drop"),
    *("work", "advise", "metrics", "backup", "compact", "queue bench", "bench", "repair"),
}
UNWALKED = {"demo"}  # has tests of its own: a year of departures takes its time
if find_spec("prometheus_client") is None:
    UNWALKED.add("metrics")


def do_nothing(message):
    """The function of `work`."""


def made(path):
    """A store with a stream of three partitions, a group, and a queue with a dead letter."""
    with millstream.open(path, durability="process") as store:
        letters = store.stream("letters", partitions=3)
        letters.append_many([b"value"] * 1234, partition=1)
        with letters.consumer(group="readers") as consumer:
            consumer.poll()
            consumer.commit()
        mail = store.queue("mail", capacity=123_456)
        mail.put_many([b"first of all, with a long text behind it", b"1234567890123", b"third"])
        mail.get(timeout=5).reject("no such address, and nobody knows of another one")
    return path


@pytest.fixture
def path(tmp_path):
    """The path of a store that the test may change."""
    return made(tmp_path / "store")


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """The path of a store that no test changes, alone in its directory."""
    return made(tmp_path_factory.mktemp("lasting") / "store")


@pytest.fixture(autouse=True)
def no_stdin():
    """Descriptor 0 is empty, whoever runs the tests."""
    before = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    yield
    os.dup2(before, 0)
    os.close(before)
    os.close(nothing)


def filled(words, path):
    """The arguments of a command that does something, in this store."""
    with millstream.open(path, mode="r") as store:
        mail = store.queue("mail")
        ids = {"READY": mail.peek(1)[0].id, "DEAD": mail.dead.list()[0].id}
    known = {"STORE": path, "COPY": path.with_name("copy"), **ids}
    return [*words.split(), *(str(known.get(one, one)) for one in VALID[words])]


def run(capfd, arguments, code):
    """Run a command here, hold it to its exit code, and return (stdout, lines of stderr)."""
    capfd.readouterr()
    found = main(list(map(str, arguments)))
    out, err = capfd.readouterr()
    assert found == code, (arguments, found, out, err)
    assert "Traceback" not in err
    return out, err.splitlines()


def test_the_walk_knows_every_command():
    assert VALID.keys() | UNWALKED == COMMANDS.keys()


@pytest.mark.parametrize("words", sorted(set(OF_A_STORE) - MAKE))
def test_a_store_that_is_not_there_is_refused_and_not_made(lasting, capfd, words):
    arguments = filled(words, lasting)
    missing = lasting.with_name("stroe")
    arguments[arguments.index(str(lasting))] = str(missing)
    out, err = run(capfd, arguments, 3)
    assert out == ""
    assert err == [f"millstream: {missing}: no such store; did you mean {lasting}?"]
    assert os.listdir(lasting.parent) == ["store"]


@pytest.mark.parametrize("words, what", NAMING)
def test_a_name_that_is_not_there_is_refused_and_not_made(lasting, capfd, words, what):
    known, typo = NAMES[what]
    arguments = filled(words, lasting)
    if known in arguments:
        arguments[arguments.index(known)] = typo
    else:
        arguments.append(typo)
    out, err = run(capfd, arguments, 3)
    assert out == ""
    [line] = err
    assert line.startswith("millstream: ")
    assert f"there are: {known}" in line
    assert f"did you mean '{known}'?" in line
    with millstream.open(lasting, mode="r") as store:
        assert store.streams() == ["letters"]
        assert store.queues() == ["mail"]
        assert store.stream("letters").groups() == ["readers"]


def test_a_queue_in_place_of_a_stream_is_told(lasting, capfd):
    _, [line] = run(capfd, ["cat", lasting, "mail"], 3)
    assert "a queue is called that" in line
    _, [line] = run(capfd, ["queue", "peek", lasting, "letters"], 3)
    assert "a stream is called that" in line


@pytest.mark.parametrize("words", sorted(MAKE))
def test_what_is_to_be_made_is_made(path, capfd, words):
    arguments = filled(words, path)
    arguments[arguments.index(str(path))] = str(path.with_name("new"))
    run(capfd, arguments, 0)
    with millstream.open(path.with_name("new"), mode="r") as store:
        assert [*store.streams(), *store.queues()] == ["mail" if "queue" in words else "letters"]


@pytest.mark.parametrize("words", ["queue cancel", "queue dead redrive", "queue dead purge"])
def test_an_id_that_is_not_there_ends_with_3_and_the_others_are_done(path, capfd, words):
    arguments = filled(words, path)
    _, err = run(capfd, [*arguments, "5"], 3)
    assert any(line.startswith("1 message cancelled") or "1 dead letter" in line for line in err)
    assert any(line.startswith("millstream: 5: ") for line in err)
    out, err = run(capfd, [*arguments, "--json"], 3)
    assert json.loads(out) in ({"cancelled": []}, {"redriven": 0}, {"purged": 0})


def test_redrive_of_all_into_a_full_queue_says_what_is_left(tmp_path, capfd):
    with millstream.open(tmp_path / "s") as store:
        queue = store.queue("q", capacity=2)
        for _ in range(3):
            queue.put(b"bad")
            queue.get(timeout=5).reject("no")
        queue.put(b"good")
    _, err = run(capfd, ["queue", "dead", "redrive", tmp_path / "s", "q", "--all"], 3)
    assert err == [
        "q: 1 dead letter redriven",
        "millstream: queue 'q' is full: 2 dead letters left",
    ]


def test_an_id_twice_is_one_id(path, capfd):
    arguments = filled("queue cancel", path)
    _, err = run(capfd, [*arguments, arguments[-1]], 0)
    assert err == ["1 message cancelled"]


@pytest.mark.parametrize("words", sorted(VALID.keys() - GO_ON))
def test_a_pipe_gets_no_blank_line_and_with_json_nothing_but_json(path, capfd, words):
    arguments = filled(words, path)
    if words != "queue dead redrive":  # done only once
        out, _ = run(capfd, [*arguments, "--json"], 0)
        for line in out.splitlines():
            json.loads(line)
    if words in ("backup", "groups rm", "queue cancel", "queue dead purge", "drop", "queue drop"):
        return
    out, err = run(capfd, arguments, 0)
    assert all(line.strip() for line in (*out.splitlines(), *err)), (out, err)


@pytest.mark.parametrize("words", ["ls", "groups ls", "queue ls", "advise", "dump"])
def test_an_empty_store_is_no_error(tmp_path, capfd, words):
    """Nothing on stdout where there is nothing, so that `wc -l` counts it as 0."""
    with millstream.open(tmp_path / "empty"):
        pass
    out, err = run(capfd, [*words.split(), tmp_path / "empty"], 0)
    assert out == ""
    assert all(err)
    out, _ = run(capfd, [*words.split(), tmp_path / "empty", "--json"], 0)
    assert out in ("[]\n", "")


def test_work_says_what_it_did_once(path, capfd):
    _, err = run(capfd, filled("work", path), 0)
    assert sum("2 done" in line for line in err) == 1


@pytest.mark.parametrize("words", ["append", "queue put"])
def test_a_terminal_is_told_that_lines_are_read(tmp_path, words):
    process, terminal = at_terminal(*words.split(), tmp_path / "s", "s")
    with process, open(terminal, "r+b", buffering=0):
        read_until(terminal, b"Ctrl-D")
        os.write(terminal, b"a line\n\x04")
        shown = read_until(terminal, None)
        assert b"1 record appended" in shown or b"1 message put" in shown
    assert process.returncode == 0


def test_a_usage_error_says_where_it_is_explained(capfd):
    for words in (
        [],
        ["nonsense"],
        ["ls"],
        ["queue", "put"],
        ["queue", "dead", "ls", "--nonsense"],
    ):
        _, err = run(capfd, words, 2)
        assert "--help`" in err[-1]


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_help_says_every_default(words):
    parser = COMMANDS[words]
    text = " ".join(parser.format_help().split())
    said = Counter(re.findall(r"\(default: ([^)]*)\)", text))
    wanted = Counter()
    values = [one for one in parser._actions if one.option_strings and one.nargs != 0]
    assert text.count("(default: ") >= len(values), f"{words}: some take a value and say no default"
    for action in parser._actions:
        assert action.help, f"{words}: {action.dest}"
        default = action.default
        if action.option_strings and repr(default) not in ("None", "False", "[]", "'==SUPPRESS=='"):
            wanted[f"{default:.15g}" if type(default) is float else str(default)] += 1
    assert wanted <= said


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_and_version_end_well_whoever_reads_them(unbuffered, monkeypatch):
    """A reader that went away made a traceback of `--version`."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    for words in (["--help"], ["--version"], ["queue", "--help"], ["queue", "put", "--help"]):
        command = [sys.executable, "-m", "millstream", *words]
        ours, theirs = os.pipe()
        os.close(ours)
        with open(theirs, "wb") as gone:
            done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, done.stderr) == (141, b"")
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 4
        assert done.stderr == b"millstream: No space left on device\n"


# --- narrow terminals -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    """What a terminal is to the code: something that says it is one."""

    encoding = "utf-8"

    def isatty(self):
        return True


def words_with_digits(text):
    """The words of a text that have a digit in them: numbers, sizes, times."""
    return {word for word in text.split() if any(char.isdigit() for char in word)}


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_no_number_is_broken_on_a_narrow_terminal(lasting, capfd, monkeypatch, rich, columns):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    for words in sorted(VALID.keys() - UNTABLED - GO_ON):
        arguments = filled(words, lasting)
        before, _ = run(capfd, arguments, 0)
        terminal = Terminal()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", terminal)
            run(capfd, arguments, 0)
        after, _ = run(capfd, arguments, 0)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
        assert ("\x1b[" in terminal.getvalue()) <= rich
        wanted = words_with_digits(before) & words_with_digits(after)  # ages pass meanwhile
        assert wanted
        fitting = {word for word in wanted if len(word) <= columns - 4}
        assert fitting - words_with_digits(shown) == set(), shown
        lines = shown.splitlines()
        whole = [line for line in lines if not any(len(word) > columns for word in line.split())]
        assert max(map(len, whole)) <= columns


def test_the_modules_of_the_command_line_print_through_output_alone():
    """`print` would write blank lines into pipes, and text beside JSON."""
    for file in (Path(millstream.__file__).parent / "cli").glob("*.py"):
        if file.name not in ("output.py", "__init__.py"):
            assert not re.search(r"(?<![\w.])print\(", file.read_text()), file
