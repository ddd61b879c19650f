"""A handler of logging: what it stores, what it drops, and that the program does not notice."""

import json
import logging
import logging.config
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest

import millstream
from millstream.cli import main
from millstream.contrib.logging import StreamHandler


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def handler(path):
    made = StreamHandler(path)
    yield made
    made.close()


@pytest.fixture
def log(handler):
    """A logger that nothing else knows."""
    made = logging.Logger("shop")
    made.addHandler(handler)
    return made


def stored(path, name="logs"):
    """The records of a stream, as objects."""
    with millstream.open(path, mode="r") as store:
        batches = store.stream(name).read()
        return [json.loads(value) for batch in batches for value in batch.values]


def test_a_record_is_all_that_there_is_of_it(log, handler, path):
    try:
        raise KeyError("tea")
    except KeyError:
        log.exception("no %s", "täa", extra={"customer": 17, "odd": {1, 2}}, stack_info=True)
    assert handler.flush()
    (found,) = stored(path)
    assert found["message"] == "no täa"
    assert (found["level"], found["logger"], found["customer"]) == ("ERROR", "shop", 17)
    assert found["odd"] == "{1, 2}"
    assert found["exception"]["type"] == "builtins.KeyError"
    assert found["exception"]["message"] == "'tea'"
    assert 'raise KeyError("tea")' in found["exception"]["traceback"]
    assert "log.exception" in found["stack"]
    assert (found["process"], found["thread"]) == (os.getpid(), "MainThread")
    assert found["function"] == "test_a_record_is_all_that_there_is_of_it"
    assert found["time"].endswith("+00:00")


def test_extra_does_not_hide_what_a_record_is(log, handler, path):
    log.error("real", extra={"level": "fake", "time": "fake"})
    assert handler.flush()
    assert stored(path)[0]["level"] == "ERROR"


def test_records_have_their_time_and_their_logger(log, handler, path):
    record = logging.makeLogRecord({"name": "shop", "msg": "x", "created": 1.5})
    handler.handle(record)
    assert handler.flush()
    with millstream.open(path, mode="r") as store:
        found = store.stream("logs").get(0, 0)
    assert (found.key, found.timestamp) == (b"shop", 1_500_000)


def test_a_formatter_of_the_user_is_used(log, handler, path):
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.error("lone \ud800")
    assert handler.flush()
    with millstream.open(path, mode="r") as store:
        assert store.stream("logs").get(0, 0).value == rb"ERROR lone \ud800"


def test_tail_renders_fields(log, handler, path, capsys):
    log.error("no tea")
    handler.flush()
    command = ["tail", str(path), "logs", "--format", r"%{level} %{logger}: %{message}%{none}\n"]
    assert main(command) == 0
    assert capsys.readouterr().out == "ERROR shop: no tea\n"


# --- what is dropped ------------------------------------------------------------------------------


def test_a_program_that_logs_faster_than_the_store_takes_is_not_stopped(path, monkeypatch):
    entered, go = threading.Event(), threading.Event()
    append = millstream.Stream.append_many

    def slow(*arguments, **options):
        entered.set()
        assert go.wait(60)
        return append(*arguments, **options)

    handler = StreamHandler(path, capacity=10)
    log = logging.Logger("shop")
    log.addHandler(handler)
    monkeypatch.setattr(millstream.Stream, "append_many", slow)
    log.info("0")
    assert entered.wait(60)
    for number in range(1, 31):
        log.info("%d", number)  # would hang
    assert not handler.flush(timeout=0.01)
    assert handler.dropped == 20
    go.set()
    assert handler.flush()
    handler.close()
    assert [record["message"] for record in stored(path)] == [str(n) for n in range(11)]


def test_what_cannot_be_formatted_is_dropped_as_other_handlers_do(log, handler, path, capsys):
    log.error("%d", "no number")
    log.error("after")
    assert handler.flush()
    assert handler.dropped == 1
    assert "--- Logging error ---" in capsys.readouterr().err
    assert [record["message"] for record in stored(path)] == ["after"]


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


class Unshown(Exception):
    """An object that fails where it is shown."""

    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


def test_a_part_that_cannot_be_shown_says_why_and_the_rest_is_kept(log, handler, path):
    ring, deep = [1], {}
    ring.append(ring)
    for _ in range(5000):
        deep = {"deep": deep}
    many = {(1, 2): "tuple", "b": 1, 3: [float("inf")], Unshown(): 4}
    log.error("figures", extra={"loss": float("nan"), "many": many, "set": {1}})
    log.error("odd", extra={"bad": Unshown(), "ring": ring, "deep": deep, "huge": 10**5000, "n": 1})
    try:
        raise Unshown
    except Unshown:
        log.exception("raised")
    assert handler.flush()
    assert handler.dropped == 0
    with millstream.open(path, mode="r") as store:
        texts = [value for batch in store.stream("logs").read() for value in batch.values]
    figures, odd, raised = (json.loads(text, parse_constant=no_constant) for text in texts)
    assert (figures["message"], figures["loss"], figures["set"]) == ("figures", "nan", "{1}")
    assert figures["many"].pop("<Unshown: repr() raised RuntimeError>") == 4
    assert figures["many"] == {"(1, 2)": "tuple", "b": 1, "3": ["inf"]}
    assert odd["bad"] == "<Unshown: repr() raised RuntimeError>"
    assert odd["ring"] == [1, "<list: within itself>"]
    assert "levels deep" in json.dumps(odd["deep"])
    assert (odd["huge"], odd["n"]) == ("<int: repr() raised ValueError>", 1)
    assert raised["exception"]["message"] == "<Unshown: str() raised RuntimeError>"
    assert "raise Unshown" in raised["exception"]["traceback"]


def test_a_store_that_is_closed_drops(tmp_path):
    store = millstream.open(tmp_path / "store")
    handler = StreamHandler(store)
    store.close()
    handler.handle(logging.makeLogRecord({"msg": "x"}))
    assert handler.flush()
    assert handler.dropped == 1
    assert isinstance(handler.error, millstream.Closed)
    handler.close()


def test_one_record_that_is_too_long_is_dropped_alone(log, handler, path, monkeypatch):
    append = millstream.Stream.append_many

    def short(stream, values, **options):
        if any(len(value) > 10_000 for value in values):
            raise millstream.LimitExceeded("too long")
        return append(stream, values, **options)

    monkeypatch.setattr(millstream.Stream, "append_many", short)
    for text in ("a", "b" * 20_000, "c"):
        log.error(text)
    assert handler.flush()
    assert handler.dropped == 1
    assert [record["message"] for record in stored(path)] == ["a", "c"]


def test_what_the_store_itself_logs_has_no_end_to_loop_in(path, monkeypatch):
    handler = StreamHandler(path)
    log = logging.Logger("millstream")
    log.addHandler(handler)
    append = millstream.Stream.append_many

    def logging_append(*arguments, **options):
        log.warning("appending")
        return append(*arguments, **options)

    monkeypatch.setattr(millstream.Stream, "append_many", logging_append)
    log.warning("one")
    assert handler.flush()
    assert handler.dropped == 1
    assert len(stored(path)) == 1
    handler.close()


def test_the_end_of_logging_does_not_wait_for_who_waits_for_it(path, monkeypatch):
    """`logging.shutdown` held the lock of the handler, for which the thread waited to log."""
    handler = StreamHandler(path)
    log = logging.Logger("millstream")
    log.addHandler(handler)
    append = millstream.Stream.append_many
    entered, go = threading.Event(), threading.Event()

    def logging_append(*arguments, **options):
        entered.set()
        assert go.wait(60)
        log.warning("appending")
        return append(*arguments, **options)

    monkeypatch.setattr(millstream.Stream, "append_many", logging_append)
    log.warning("one")
    assert entered.wait(60)
    flush = handler.flush
    monkeypatch.setattr(handler, "flush", lambda: (go.set(), flush(timeout=20))[1])
    begun = time.monotonic()
    logging.shutdown([weakref.ref(handler)])
    assert time.monotonic() - begun < 15
    assert len(stored(path)) == 1


def test_threads_log_at_once(log, handler, path):
    def work():
        for number in range(500):
            log.error("%d", number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handler.flush()
    assert len(stored(path)) + handler.dropped == 4000
    assert handler.dropped == 0


def test_filters_are_asked(log, handler, path):
    handler.addFilter(lambda record: record.getMessage() != "no")
    log.error("no")
    log.error("yes")
    assert handler.flush()
    assert [record["message"] for record in stored(path)] == ["yes"]


def test_records_after_the_end_are_dropped(log, handler):
    handler.close()
    log.error("late")
    assert handler.dropped == 1
    assert not handler.flush()


# --- processes ------------------------------------------------------------------------------------


HEAD = """
    import logging, os, signal, sys
    from millstream.contrib.logging import StreamHandler

    handler = StreamHandler(sys.argv[1], durability="process")
    logging.basicConfig(level="INFO", handlers=[handler])
"""


def program(path, code, *words):
    text = textwrap.dedent(HEAD) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", text, path, *words])


def test_eight_processes_log_at_once_and_lose_nothing_that_was_flushed(path):
    code = """
        for number in range(500):
            logging.info("%s", number)
        assert handler.flush() and handler.dropped == 0
        logging.info("unflushed")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    writers = [program(path, code) for _ in range(8)]
    assert [writer.wait(60) for writer in writers] == [-signal.SIGKILL] * 8
    of = {}
    for record in stored(path):
        of.setdefault(record["process"], []).append(record["message"])
    assert len(of) == 8
    for messages in of.values():
        assert messages[:500] == [str(number) for number in range(500)]


def test_the_end_of_a_program_appends_what_waits(path):
    assert program(path, "logging.info('last')").wait(60) == 0
    assert [record["message"] for record in stored(path)] == ["last"]


def test_a_forked_process_logs_by_itself(log, handler, path):
    log.error("parent")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log.error("child")
            code = 0 if handler.flush() and handler.dropped == 0 else 2
            handler.close()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert handler.flush()
    found = {record["message"]: record["process"] for record in stored(path)}
    assert found == {"parent": os.getpid(), "child": pid}
    assert len(stored(path)) == 2


def test_a_child_of_multiprocessing_appends_at_its_end(log, path):
    child = multiprocessing.get_context("fork").Process(target=log.error, args=("child",))
    child.start()
    child.join(60)
    assert [record["message"] for record in stored(path)] == ["child"]


def test_a_signal_handler_may_log(log, handler, path):
    before = signal.signal(signal.SIGUSR1, lambda *_: log.error("signal"))
    try:
        for _ in range(200):
            log.error("program")
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handler.flush()
    assert len(stored(path)) == 400


# --- configuration --------------------------------------------------------------------------------


def configuration(path, **options):
    of_handler = {"class": "millstream.contrib.logging.StreamHandler", "store": str(path)}
    loggers = {"of_dict": {"handlers": ["stream"], "level": "INFO", "propagate": False}}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"stream": {**of_handler, "stream": "app", "level": "WARNING", **options}},
        "loggers": loggers,
    }


def test_dict_config_makes_it(path):
    logging.config.dictConfig(configuration(path, retention={"bytes": "1MiB"}, capacity=100))
    log = logging.getLogger("of_dict")
    (handler,) = log.handlers
    log.info("below its level")
    log.warning("at its level")
    assert handler.flush()
    assert [record["message"] for record in stored(path, "app")] == ["at its level"]
    with millstream.open(path, mode="r") as store:
        assert store.stream("app").retention.bytes == 1 << 20
    log.removeHandler(handler)
    handler.close()


def test_what_cannot_be_is_refused_when_it_is_configured(tmp_path, path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="Unable to configure handler") as raised:
        logging.config.dictConfig(configuration(tmp_path / "file"))
    assert "is not a directory" in str(raised.value.__cause__)
    with millstream.open(path) as store:
        store.stream("logs", retention=millstream.Retention(age=1.0))
        with pytest.raises(millstream.ConfigMismatch, match="retention"):
            StreamHandler(store, retention={"age": "7d"})
    with pytest.raises(millstream.InvalidArgument, match="no/name"):
        StreamHandler(path, "no/name")


def test_a_refused_handler_leaves_nothing_to_close(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    program = f"from millstream.contrib.logging import StreamHandler; StreamHandler({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]  # logging closes at the end what it knows of
    assert done.returncode == 1 and last.startswith("millstream.StorageError"), done.stderr


def test_retention_rotates(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("logs", segment_bytes=1 << 16)
        handler = StreamHandler(store, retention=None)
        stream.alter(retention=millstream.Retention(bytes=1 << 17))
        log = logging.Logger("shop")
        log.addHandler(handler)
        for _ in range(5):
            for _ in range(500):
                log.info("x" * 200)
            assert handler.flush()
        stream.enforce_retention()
        assert 0 < stream.first_offset(0) < stream.next_offset(0) == 2500
        handler.close()
