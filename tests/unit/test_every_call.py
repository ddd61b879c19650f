"""Every public call, under every condition that a program can meet: documented exceptions alone."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import every_call
import pytest

import millstream
from millstream import compat, inspect


@pytest.mark.parametrize("condition", every_call.CONDITIONS)
def test_every_call_ends_as_documented(tmp_path, condition):
    env = dict(os.environ)
    if condition == "memory" and "address" in env.get("MILLSTREAM_SANITIZE", ""):
        pytest.skip("AddressSanitizer itself needs more address space than is left there")
    if condition == "allocations":  # without what counts lines in children: it needs memory itself
        env = {name: value for name, value in env.items() if "COVERAGE" not in name}
    ended = subprocess.run(
        [sys.executable, Path(every_call.__file__), condition, tmp_path],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]


def released():
    view = memoryview(bytearray(b"abc"))
    view.release()
    return view


def strided():
    return memoryview(bytearray(b"abcdef"))[::2]


@pytest.mark.parametrize("make", [released, strided])
def test_bytes_that_cannot_be_read_are_a_wrong_type(store, make):
    stream = store.stream("s", partitions=2)
    queue = store.queue("q", dedup_window=60, ordering="key")
    producer = stream.producer(id="p")

    def within(work):
        with store.transaction() as tx:
            work(tx)

    with stream.view() as view:
        calls = [
            lambda: stream.append(b"1", key=make()),
            lambda: stream.append_many([make()]),
            lambda: stream.append(b"1", headers={"a": make()}),
            lambda: stream.append_many([b"1"], timestamps=make()),
            lambda: stream.partition_for(make()),
            lambda: producer.append(make(), sequence=1),
            lambda: queue.put(make()),
            lambda: queue.put(b"1", key=make()),
            lambda: queue.put(b"1", dedup_id=make()),
            lambda: queue.put(b"1", headers={"a": make()}),
            lambda: queue.put_many([make()]),
            lambda: view[make()],
            lambda: view.get(make()),
            lambda: make() in view,
            lambda: within(lambda tx: tx.append(stream, make())),
            lambda: within(lambda tx: tx.append(stream, b"1", key=make())),
            lambda: within(lambda tx: tx.append(stream, b"1", headers={"a": make()})),
            lambda: within(lambda tx: tx.put(queue, make())),
            lambda: within(lambda tx: tx.put(queue, b"1", key=make())),
            lambda: within(lambda tx: tx.put(queue, b"1", dedup_id=make())),
        ]
        for number, call in enumerate(calls):
            try:
                call()
            except (millstream.InvalidType, millstream.InvalidArgument):
                continue
            assert make is strided, f"call {number} took it"  # what is copied may be strided
    if make is released:
        assert (stream.next_offset(0), stream.next_offset(1), len(queue)) == (0, 0, 0)


def test_paths_are_bytes_too_or_a_wrong_type(tmp_path):
    with millstream.open(os.fsencode(tmp_path / "store")) as store:
        store.stream("s").append(b"1")
    path = os.fsencode(tmp_path / "store")
    assert inspect.verify(path).ok
    assert [record.value for record in inspect.records(path)] == [b"1"]
    for wrong in (5, None, b"", "a\0b"):
        for call in (inspect.verify, inspect.store, millstream.open):
            with pytest.raises((millstream.InvalidType, millstream.InvalidArgument)):
                call(wrong)


def test_relative_path_in_a_removed_directory(tmp_path):
    before = os.getcwd()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        for call in (
            lambda: millstream.open("store"),
            lambda: millstream.open("store", mode="r"),
            lambda: compat.Queue(path="store"),
        ):
            with pytest.raises(millstream.NotFound, match="working directory"):
                call()
        millstream.open(tmp_path / "store").close()
        millstream.temporary().close()
    finally:
        os.chdir(before)


def test_handles_are_unpickled_while_threads_open_stores(tmp_path):
    interval = sys.getswitchinterval()
    with millstream.open(tmp_path / "store") as store:
        kept = pickle.dumps(store.stream("s"))
        ended = threading.Event()
        wrong = []

        def opening(number):
            while not ended.is_set():
                millstream.open(tmp_path / f"other{number}").close()

        def unpickling():
            try:
                for _ in range(2000):
                    assert pickle.loads(kept).store is store
            except BaseException as error:
                wrong.append(error)

        sys.setswitchinterval(1e-6)
        openers = [threading.Thread(target=opening, args=(number,)) for number in range(3)]
        readers = [threading.Thread(target=unpickling) for _ in range(3)]
        try:
            for thread in (*openers, *readers):
                thread.start()
            for thread in readers:
                thread.join()
        finally:
            ended.set()
            for thread in openers:
                thread.join()
            sys.setswitchinterval(interval)
        assert not wrong
