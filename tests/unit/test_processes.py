"""Several processes on one store: appending, reading, waking, altering, dropping, interrupting."""

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash
from timing import SOON, until

import millstream
from millstream import Closed, LockTimeout, WaitTimeout, inspect

SPAWN = multiprocessing.get_context("spawn")


def values(stream, **options):
    return [value for batch in stream.read(**options) for value in batch.values]


class Child:
    """A process that runs a program with `path` and `millstream` at hand and says `ready`."""

    def __init__(self, program, path):
        head = "import sys, time, threading, signal, millstream\npath = sys.argv[1]\n"
        head += "def say(*words): print(*words, flush=True)\n"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", head + textwrap.dedent(program), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self):
        line = self.process.stdout.readline().strip()
        if not line:
            raise AssertionError(self.process.communicate(timeout=600)[1])
        return line

    def go(self, line=""):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self, timeout=60):
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


# --- appending at once ----------------------------------------------------------------------------

PRODUCERS, BATCHES, SIZE = 8, 120, 7


def produce(stream, number, barrier):
    barrier.wait(60)
    for turn in range(BATCHES):
        records = [b"%d %d %d" % (number, turn, i) for i in range(SIZE)]
        if turn % 3:
            stream.append_many(records, partition=0)
        else:
            for record in records[:1]:
                stream.append(record, partition=0)
            stream.append_many(records[1:], partition=0)
    stream.store.close()


def test_eight_spawned_producers_and_a_reader_on_one_partition(tmp_path):
    """Offsets are dense, each producer's records in order, and a share is seen whole or not."""
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", partitions=2, segment_bytes=1 << 16)
        barrier = SPAWN.Barrier(PRODUCERS + 1)
        processes = [
            SPAWN.Process(target=produce, args=(stream, number, barrier))
            for number in range(PRODUCERS)
        ]
        for process in processes:
            process.start()
        barrier.wait(60)
        total = PRODUCERS * BATCHES * SIZE
        following, live = 0, []
        for batch in stream.read(partition=0, follow=True, timeout=60, max_records=total):
            assert batch.first_offset == following
            following = batch.next_offset
            live += batch.values
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert following == stream.next_offset(0) == total
        assert values(stream, partition=0) == live
    seen = {number: [] for number in range(PRODUCERS)}
    runs = 0
    previous = None
    for value in live:
        number, turn, i = map(int, value.split())
        seen[number].append((turn, i))
        whole = previous == (number, turn, i - 1)
        assert i < 2 or whole, "records of one append_many lie together"
        assert i != 1 or turn % 3 == 0 or whole
        runs += not whole
        previous = (number, turn, i)
    expected = [(turn, i) for turn in range(BATCHES) for i in range(SIZE)]
    assert all(found == expected for found in seen.values())
    assert runs > 0
    records = [r.value for r in inspect.records(tmp_path / "s", "s", 0)]
    assert records == live


def add_by_key(stream, final, queue):
    found = []
    i = left = 0
    while left < 400:
        left += stream.partitions == final
        i += 1
        key = b"%d" % (i % 97)
        if i % 2:
            found.append((key, stream.append(b"%d" % i, key=key).partition))
        else:
            spans = stream.append_many([b"%d" % i] * 5, keys=[key] * 5)
            found += [(key, span.partition) for span in spans for _ in range(span.count)]
    queue.put((found, stream.partitions))
    stream.store.close()


def test_partitions_are_added_while_others_append_by_key(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", partitions=2)
        queue = SPAWN.Queue()
        processes = [SPAWN.Process(target=add_by_key, args=(stream, 5, queue)) for _ in range(3)]
        for process in processes:
            process.start()
        until(lambda: stream.next_offset(0) > 50)
        for _ in range(3):
            before = stream.stats().records
            stream.add_partitions(1)
            until(lambda before=before: stream.stats().records > before + 50)
        results = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert stream.partitions == 5
        for found, partitions in results:
            assert partitions == 5
            for key, partition in found:
                assert partition in {xxhash.xxh3_64_intdigest(key) % n for n in (2, 3, 4, 5)}
            key, partition = found[-1]
            assert partition == stream.partition_for(key)
        for partition in range(5):
            for batch in stream.read(partition=partition):
                for key in batch.keys:
                    hashed = xxhash.xxh3_64_intdigest(key)
                    assert partition in {hashed % n for n in (2, 3, 4, 5)}
        assert stream.stats().records == sum(len(found) for found, _ in results)
    assert inspect.verify(tmp_path / "s").ok


def test_reader_wakes_when_another_process_appends(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", partitions=4)
        program = """
            store = millstream.open(path)
            stream = store.stream("s")
            say("ready")
            for line in sys.stdin:
                stream.append(str(time.monotonic()).encode())
            store.close()
        """
        with Child(program, tmp_path / "s") as child:
            assert child.line() == "ready"
            reader = stream.read(follow=True, timeout=600)
            delays = []
            for _ in range(30):
                threading.Timer(0.01, child.go).start()
                [value] = next(reader).values
                delays.append(time.monotonic() - float(value))
            assert child.end()[0] == 0
    assert max(delays) < SOON


def test_waiting_reader_of_another_process_ends_when_dropped(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        store.stream("s").append(b"x")
        program = """
            with millstream.open(path) as store:
                stream = store.stream("s")
                reader = stream.read(follow=True, timeout=60)
                next(reader)
                say("waits")
                try:
                    next(reader)
                except millstream.Closed as error:
                    say(error)
                for call in (lambda: stream.append(b"x"), lambda: stream.append_many([b"x"]),
                             stream.stats, lambda: stream.read()):
                    try:
                        call()
                    except millstream.Closed as error:
                        assert "dropped" in str(error), error
                    else:
                        raise AssertionError
                again = store.stream("s", partitions=3)
                say(again.append(b"new", partition=2))
        """
        with Child(program, tmp_path / "s") as child:
            assert child.line() == "waits"
            begun = time.monotonic()
            store.drop_stream("s")
            assert "dropped" in child.line()
            assert time.monotonic() - begun < SOON  # of the minute that it would wait
            assert "offset=0" in child.line()
            assert child.end()[0] == 0
        assert store.stream("s").partitions == 3


def test_alter_is_seen_by_another_process(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        program = """
            with millstream.open(path) as store:
                stream = store.stream("s")
                say(stream.stats().durability)
                sys.stdin.readline()
                stats = stream.stats()
                say(stats.durability, stats.retention.records, stats.segment_bytes)
                stream.alter(retention=None)
                say("done")
        """
        with Child(program, tmp_path / "s") as child:
            assert child.line() == "interval"
            stream.alter(
                durability="sync", retention=millstream.Retention(records=7), segment_bytes="1MiB"
            )
            child.go()
            assert child.line() == "sync 7 1048576"
            assert child.line() == "done"
            assert stream.stats().retention == millstream.Retention()


# --- handles that are sent ------------------------------------------------------------------------


def use(store, stream, plain, queue):
    assert stream.store is store is plain.store
    with store:
        position = stream.append(b"child")
        queue.put((position, stream.durability, plain.durability, values(stream), os.getpid()))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_handles_are_sent_to_processes(tmp_path, method):
    context = multiprocessing.get_context(method)
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", durability="process")
        stream.append(b"parent")
        queue = context.Queue()
        arguments = (store, store.stream("s", durability="sync"), stream, queue)
        process = context.Process(target=use, args=arguments)
        process.start()
        position, strict, plain, found, pid = queue.get(timeout=60)
        process.join(60)
        assert process.exitcode == 0
        assert pid != os.getpid()
        assert (strict, plain) == ("sync", "process")
        assert found == [b"parent", b"child"]
        assert pickle.loads(pickle.dumps(position)) == position == (0, 1, 1)
        assert stream.next_offset(0) == 2


# --- Ctrl-C and time-outs -------------------------------------------------------------------------

WAITS = {
    "a reader that follows": "list(stream.read(follow=True, start='latest'))",
    "a reader of one partition": "list(stream.read(partition=1, follow=True, start='latest'))",
    "a durable reader": "list(stream.read(follow=True, durable=True, start='latest'))",
    "an append": "stream.append(b'x', partition=0, timeout=600)",
    "append_many": "stream.append_many([b'x'] * 9, partition=0)",
    "a sync": "stream.append(b'x', partition=1, durability='sync', timeout=600)",
    "flush": "stream.append(b'x', partition=1, durability='process'); stream.flush(timeout=600)",
    "retention": "stream.enforce_retention()",
    "opening": "millstream.open(path, timeout=600)",
}


def hold_words(path, stream, member):
    """Make it look as if a living process held every word of partitions 0 and 1, and the gate."""
    control = path / "streams" / "s" / "control"
    with open(control, "r+b") as file:
        for at in (4096, 4096 + 256 + 64, 4096 + 128, 4096 + 256 + 128):
            file.seek(at)
            file.write(member.to_bytes(4, "little"))


@pytest.mark.parametrize("what", WAITS)
def test_control_c_ends(tmp_path, what):
    path = tmp_path / "s"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", partitions=2, retention=millstream.Retention(records=1 << 40))
        store._background.stop()
        for partition in range(2):
            stream.append(b"x", partition=partition)
        program = f"""
            store = millstream.open(path, durability="process")
            stream = store.stream("s")
            store._background.stop()
            stream.stats()
            say("ready")
            sys.stdin.readline()
            try:
                say("waits")
                {WAITS[what]}
            except KeyboardInterrupt:
                say("interrupted")
                sys.stdin.readline()
                store.close()
            else:
                say("ended")
        """
        with Child(program, path) as child:
            assert child.line() == "ready"
            word = store.session.members.word
            if what == "opening":
                store.session.members.enter_gate(10)
            else:
                hold_words(path, stream, word)
            child.go()
            assert child.line() == "waits"
            time.sleep(0.15)  # it waits by now; if not, it is interrupted earlier
            child.process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            assert child.line() == "interrupted"
            assert time.monotonic() - begun < SOON
            if what == "opening":
                store.session.members.leave_gate()
            else:
                hold_words(path, stream, 0)
            child.go()
            code, _, err = child.end()
            assert code == 0, err
        assert stream.append(b"y", partition=0).offset >= 1


def test_time_outs_name_the_holder(tmp_path):
    path = tmp_path / "s"
    with (
        millstream.open(path, durability="process") as store,
        Child(
            """
            store = millstream.open(path)
            say(store.session.members.word)
            sys.stdin.readline()
            store.close()
        """,
            path,
        ) as child,
    ):
        stream = store.stream("s", partitions=2)
        store._background.stop()
        for partition in range(2):
            stream.append(b"x", partition=partition)
        hold_words(path, stream, int(child.line()))
        begun = time.monotonic()
        for call in (
            lambda: stream.append(b"y", partition=0, timeout=0.2),
            lambda: stream.append(bytearray(b"y"), partition=0, timeout=0.2),
            lambda: stream.append_many([b"y"], partition=0, timeout=0.2),
        ):
            with pytest.raises(LockTimeout, match=f"process {child.process.pid}") as caught:
                call()
            assert isinstance(caught.value, TimeoutError)
        assert stream.next_offset(0) == 1, "nothing was stored"
        with pytest.raises((WaitTimeout, LockTimeout)):
            stream.wait_durable(millstream.Position(1, 1, 0), timeout=0.2)
        with pytest.raises((WaitTimeout, LockTimeout, millstream.Indeterminate)):
            stream.flush(timeout=0.2)
        with pytest.raises((millstream.Indeterminate, LockTimeout)):
            stream.append(b"y", partition=1, durability="sync", timeout=0.2)
        assert time.monotonic() - begun < 6 * SOON  # and not six waits of half a minute
        # Its death is the proof that lets others go on.
        child.process.kill()
        child.process.wait()
        assert stream.append(b"z", partition=0, timeout=20).offset == 1
        stream.flush(timeout=20)
        assert stream.durable_offset(0) == 2


def test_opening_waits_for_the_gate_as_long_as_it_is_told(tmp_path):
    with millstream.open(tmp_path / "s") as store, ThreadPoolExecutor(1) as another:
        store.session.members.enter_gate(10)
        try:
            for mode in ("rw", "r"):
                begun = time.monotonic()
                with pytest.raises(LockTimeout):
                    another.submit(millstream.open, tmp_path / "s", mode=mode, timeout=0.1).result()
                assert 0.1 <= time.monotonic() - begun < SOON
        finally:
            store.session.members.leave_gate()
        millstream.open(tmp_path / "s", timeout=0).close()


def test_killed_writer_leaves_whole_batches_and_others_go_on(tmp_path):
    path = tmp_path / "s"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        program = """
            store = millstream.open(path, durability="process")
            stream = store.stream("s")
            say("ready")
            at = 0
            while True:
                stream.append_many([b"%d %d" % (at, i) for i in range(9)])
                at += 1
        """
        for turn in range(3):
            with Child(program, path) as child:
                child.line()
                before = stream.next_offset(0)
                until(lambda before=before: stream.next_offset(0) > before + 500)
                child.process.kill()
                child.process.wait()
                assert stream.append(b"%d 0" % -turn).offset > before
        found = [tuple(map(int, value.split())) for value in values(stream)]
        for (at, i), (following, j) in itertools.pairwise(found):
            assert (following, j) == (at, i + 1) or (i in (0, 8) and j == 0)
    assert inspect.verify(path).ok


def test_process_that_ends_without_closing_is_recovered_from(tmp_path):
    program = """
        import os
        store = millstream.open(path, durability="process")
        store.stream("s").append_many([b"%d" % i for i in range(100)])
        os._exit(0)
    """
    for turn in range(3):
        with Child(program, tmp_path / "s") as child:
            assert child.end()[0] == 0
        with millstream.open(tmp_path / "s", mode="r") as store:
            assert store.needs_recovery
            assert store.stream("s").next_offset(0) == 100 * (turn + 1)
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        assert values(stream) == [b"%d" % i for i in range(100)] * 3
        assert stream.append(b"x").epoch == 4
        assert {batch.epoch for batch in stream.read()} == {1, 2, 3, 4}
        epoch_one = next(stream.read())
        assert values(stream, start=millstream.Position(0, 1, 5), max_records=1) == [b"5"]
        with pytest.raises(millstream.OffsetOutOfRange, match="epoch"):
            stream.read(start=millstream.Position(0, 1, 150))
        assert values(stream, start=millstream.Position(0, 1, 100), max_records=1) == [b"0"]
    with pytest.raises(Closed):
        stream.append(b"x")
    assert epoch_one.values[0] == b"0"
