"""Under gevent's `monkey.patch_all()` whoever waits lets the other greenlets run."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import worker_jobs

JOBS = Path(worker_jobs.__file__).parent

BEGIN = f"""
from gevent import monkey
monkey.patch_all()
import sys, threading, time
import gevent
sys.path.insert(0, {str(JOBS)!r})
import millstream
from millstream.worker import Worker

ticks = 0

def tick():
    global ticks
    while True:
        gevent.sleep(0.005)  # the hub ticks, while something else waits
        ticks += 1

def until(condition):
    while not condition():
        gevent.sleep(0.005)  # the one place that looks again

def after(count, call, *arguments):
    '''Call, in another greenlet, when the hub has ticked so often since now.'''
    def wait():
        end = ticks + count
        until(lambda: ticks >= end)
        call(*arguments)
    return gevent.spawn(wait)

def main(store, queue, stream):
"""
END = """
if __name__ == "__main__":
    gevent.spawn(tick)
    with millstream.open(sys.argv[1], durability="process") as store, gevent.Timeout(60):
        main(store, store.queue("q", capacity=2), store.stream("s", create=True))
    print("done")
"""

CASES = {
    "get": """
    after(5, queue.put, b"x")
    assert queue.get().value == b"x"
""",
    "get_many and its time-out": """
    assert queue.get_many(5, timeout=0.1) == []
    after(5, queue.put, b"x")
    assert [message.value for message in queue.get_many(5)] == [b"x"]
""",
    "put into a full queue": """
    queue.put_many([b"1", b"2"])
    after(5, lambda: queue.get(timeout=0).ack())
    queue.put(b"3")
""",
    "join": """
    queue.put(b"1")
    message = queue.get(timeout=0)
    after(5, message.ack)
    queue.join()
""",
    "many at once": """
    found = []
    def get():
        with queue.get() as message:
            found.append(message)
    getting = [gevent.spawn(get) for _ in range(80)]
    for i in range(80):
        queue.put(b"%d" % i)
    gevent.joinall(getting)
    assert sorted(int(message.value) for message in found) == list(range(80))
    after(5, lambda: None).join()
""",
    "a greenlet that is killed": """
    getting = gevent.spawn(queue.get)
    gevent.sleep(0.02)  # it waits by now; if not, this shows less and is never wrong
    getting.kill()
    with gevent.Timeout(0.05, False):
        queue.get()
    after(5, queue.put, b"x")
    assert queue.get().value == b"x"
""",
    "follow": """
    after(5, stream.append, b"x")
    for batch in stream.read(follow=True):
        assert list(batch.values) == [b"x"]
        break
""",
    "follow what is durable": """
    after(5, lambda: stream.append(b"x", durability="interval"))
    for batch in stream.read(follow=True, durable=True):
        break
""",
    "wait_durable": """
    span = stream.append(b"x", durability="interval")
    after(2, stream.flush)
    stream.wait_durable(span, timeout=30)
    after(5, lambda: None).join()
""",
    "a consumer": """
    with stream.consumer("g") as consumer:
        after(5, stream.append, b"x")
        assert list(consumer.poll(None).values) == [b"x"]
        consumer.commit()
""",
    "a view": """
    with stream.view() as view:
        after(5, lambda: stream.append(b"x", key=b"k"))
        until(lambda: view.get(b"k") is not None)
        after(5, lambda: None).join()
""",
    "a transaction": """
    with store.transaction() as tx:
        tx.put(queue, b"x")
    after(5, lambda: None).join()
    assert queue.get().value == b"x"
""",
    "transactions of many": """
    def commit():
        with store.transaction() as tx:
            tx.put(queue, b"x")
            tx.append(stream, b"x")
    store.queue("q").alter(capacity=100)
    for committing in [gevent.spawn(commit) for _ in range(20)]:
        committing.get()
    after(5, lambda: None).join()
    assert len(queue) == stream.next_offset(0) == 20
""",
    "many open and close": """
    def use(number):
        with millstream.open(sys.argv[1] + str(number % 2)) as other:
            stream = other.stream("s")
            stream.append(b"x", durability="sync")
            other.queue("q").put(b"x")
            with stream.consumer(f"g{number}") as consumer:
                consumer.poll(0)
    for using in [gevent.spawn(use, number) for number in range(20)]:
        using.get()
    after(5, lambda: None).join()
""",
    "a callback of the hub does not wait for a greenlet": """
    import millstream._native as native
    lock = native.Lock("a lock")
    found = []
    def try_it():
        try:
            lock.acquire()
        except millstream.errors.Reentered as error:
            found.append(error)
    with lock:
        gevent.get_hub().loop.run_callback(try_it)
        after(5, lambda: None).join()
    assert len(found) == 1
""",
    "workers": """
    seen = []
    def work(message):
        gevent.sleep(0.01)  # the work, in which another greenlet has its turn
        seen.append(message.value)
    queue.worker(concurrency=4)(work)
    after(5, queue.put_many, [b"1", b"2"])
    with Worker(queue, work, concurrency=2):
        until(lambda: len(seen) == 2)
    queue.put(b"3")
    print(millstream.run(queue, until_empty=True))
    assert sorted(seen) == [b"1", b"2", b"3"]
""",
    "worker processes": """
    import os, worker_jobs
    to = os.path.dirname(sys.argv[1]).encode()
    queue.put(b"x", headers={"to": to})
    queue.worker(mode="process")(worker_jobs.note)
    print(millstream.run(queue, until_empty=True))
""",
    "a real thread": """
    Thread = monkey.get_original("threading", "Thread")
    start = monkey.get_original("_thread", "start_new_thread")
    found = []
    start(lambda: found.append(queue.get()), ())
    after(5, queue.put, b"x")
    until(lambda: found)
""",
}


@pytest.mark.skipif(
    "address" in os.environ.get("MILLSTREAM_SANITIZE", ""),
    reason="greenlets copy stacks, which AddressSanitizer takes for reads beyond them",
)
@pytest.mark.parametrize("case", CASES)
def test_hub_goes_on_while_something_waits(tmp_path, case):
    pytest.importorskip("gevent")
    script = tmp_path / "script.py"
    script.write_text(BEGIN + CASES[case] + "    assert ticks >= 5, ticks\n" + END)
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    assert done.returncode == 0
    # On a slow machine a worker process that has not begun after five seconds is told.
    told = [line for line in done.stderr.splitlines() if "not begun to take messages" not in line]
    assert told == []


def test_real_threads_beside_an_imported_gevent_share_locks_and_hear_signals():
    """To ask who calls ran Python code while a lock was taken: another thread took it as well."""
    program = """
        import gevent.monkey, signal, sys, threading, time
        from millstream import _native

        _native.see_greenlets()
        taken = [_native.Lock(f"of a test {number}") for number in range(3)]
        counts, ends = [0] * 6, time.monotonic() + 2

        def work(number):
            while time.monotonic() < ends:
                for lock in taken:
                    with lock:
                        counts[number] += 1
                _native.held()

        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(counts) and _native.held() == [], counts

        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4)
                ends = time.monotonic() + 10
                while time.monotonic() < ends:
                    for _ in range(1000):
                        with taken[0]:
                            pass
                raise SystemExit("a signal was lost")
            except KeyboardInterrupt:
                pass
        assert _native.held() == []
        print("ok")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
