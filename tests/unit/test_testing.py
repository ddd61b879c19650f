"""The virtual clock and the fixture that users' tests are written with."""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from timing import SOON

import millstream
from millstream import _native
from millstream.testing import clock

HOUR = 3600.0


def test_clock_begins_now_and_ends_with_its_block():
    with clock() as virtual:
        assert abs(virtual.now - time.time()) < 5
        assert virtual.advance(HOUR) == pytest.approx(virtual.now, abs=5)
        assert virtual.now - time.time() == pytest.approx(HOUR, abs=5)
        assert _native.wall_us() / 1e6 - time.time() == pytest.approx(HOUR, abs=5)
    assert abs(_native.wall_us() / 1e6 - time.time()) < 5
    with pytest.raises(millstream.InvalidArgument, match="ended"):
        virtual.advance(1)


def test_clock_ends_when_its_block_raises():
    with contextlib.suppress(ZeroDivisionError), clock() as virtual:
        virtual.advance(HOUR)
        raise ZeroDivisionError
    assert abs(_native.wall_us() / 1e6 - time.time()) < 5


def test_second_clock_is_refused():
    with clock(), pytest.raises(RuntimeError, match="already"), clock():
        pass
    with clock():
        pass


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_time_does_not_run_backwards(seconds):
    with clock() as virtual, pytest.raises(millstream.InvalidArgument):
        virtual.advance(seconds)


@pytest.mark.parametrize("seconds", ["1", None, True])
def test_seconds_are_a_number(seconds):
    with clock() as virtual, pytest.raises(millstream.InvalidType):
        virtual.advance(seconds)


def test_delay_passes_at_once_and_not_before():
    with clock() as virtual, millstream.temporary(durability="process") as store:
        queue = store.queue("q")
        queue.put(b"later", delay=14 * 24 * HOUR)
        virtual.advance(14 * 24 * HOUR - 60)
        assert queue.get_many(1, timeout=0) == []
        virtual.advance(60)
        with queue.get(timeout=60) as message:
            assert message.value == b"later"


def test_lease_passes_at_once_and_not_before():
    with clock() as virtual, millstream.temporary(durability="process") as store:
        queue = store.queue("q", lease=HOUR)
        queue.put(b"job")
        first = queue.get(timeout=60)
        virtual.advance(HOUR - 60)
        assert not first.lost
        assert queue.get_many(1, timeout=0) == []
        virtual.advance(61)
        second = queue.get(timeout=60)
        assert second.attempt == 2
        assert first.lost
        with pytest.raises(millstream.LeaseLost):
            first.ack()
        second.ack()


def test_time_to_live_passes_at_once():
    with clock() as virtual, millstream.temporary(durability="process") as store:
        queue = store.queue("q", ttl=HOUR)
        queue.put(b"news")
        virtual.advance(HOUR + 1)
        assert queue.get_many(1, timeout=0.1) == []


def test_sleeper_sees_the_jump_soon():
    with clock() as virtual, millstream.temporary(durability="process") as store:
        queue = store.queue("q")
        queue.put(b"later", delay=HOUR)
        seen = []

        def wait():
            with queue.get(timeout=10 * HOUR) as message:
                seen.append((message.value, time.monotonic()))

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.05)  # it waits by now; if not, this shows less and is never wrong
        jumped = time.monotonic()
        virtual.advance(HOUR)
        waiter.join(20)
        ((value, when),) = seen
        assert value == b"later"
        assert when - jumped < SOON  # of an hour


def test_wait_ends_without_a_jump():
    with clock(), millstream.temporary(durability="process") as store:
        start = time.monotonic()
        with pytest.raises(millstream.Empty):
            store.queue("q").get(timeout=0.05)
        assert time.monotonic() - start > 0.04


def output_of(code, **environment):
    """What a process prints, or the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_a_process_takes_its_clock_from_the_environment(tmp_path):
    day, path = 24 * HOUR, str(tmp_path / "store")
    with millstream.open(path) as store:
        store.queue("q").put(b"tomorrow", delay=day)
    code = f"""
        import millstream
        with millstream.open({path!r}) as store:
            print(len(store.queue("q").get_many(5, timeout=0.1)))
    """
    assert output_of(code) == "0"
    assert output_of(code, MILLSTREAM_CLOCK="") == "0"
    assert output_of(code, MILLSTREAM_CLOCK=f"+{day - 60:.0f}") == "0"
    assert output_of(code, MILLSTREAM_CLOCK=f"+{day + 1:.0f}") == "1"


def test_the_virtual_clock_begins_where_the_environment_has_it():
    code = """
        import time, millstream
        from millstream import _native
        from millstream.testing import clock
        def ahead():
            return round((_native.boot_us() / 1e6 - time.clock_gettime(time.CLOCK_BOOTTIME)) / 10)
        found = [ahead()]
        with clock() as virtual:
            found.append(ahead())
            virtual.advance(1000)
            found.append(ahead())
        print(*found, ahead(), round((_native.wall_us() / 1e6 - time.time()) / 10))
    """
    assert output_of(code, MILLSTREAM_CLOCK="+5000") == "500 500 600 500 500"
    assert output_of(code, MILLSTREAM_CLOCK="-5000") == "0 0 100 0 -500"


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "1e10", "+1 day"])
def test_a_clock_that_is_no_number_is_refused(text):
    error = output_of("import millstream", MILLSTREAM_CLOCK=text)
    assert error.startswith("millstream.InvalidArgument: MILLSTREAM_CLOCK=") and "+86400" in error


def test_fixture_gives_a_store_that_is_removed(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["millstream.testing"]\n')
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            import pathlib

            seen = []

            def test_one(store):
                store.queue("q").put(b"x")
                seen.append(store.path)

            def test_two(store):
                assert not pathlib.Path(seen[0]).exists()
                assert store.path != seen[0]
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_clock_needs_no_pytest():
    code = """
        import sys
        sys.modules["pytest"] = None
        from millstream.testing import clock, store
        with clock() as virtual, store() as made:
            made.queue("q").put(b"x", delay=60)
            virtual.advance(61)
            print(made.queue("q").get(timeout=60).value)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "b'x'\n", done.stderr
