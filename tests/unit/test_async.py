"""`aread`: as `read`, and the loop goes on."""

import asyncio
import contextlib
import threading

import pytest
from timing import auntil

import millstream
from millstream import Closed, OffsetOutOfRange


async def take(reader):
    return [value async for batch in reader for value in batch.values]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("millstream-")]


async def gone(limit=10.0):
    """Wait until no waiting thread is left."""
    await auntil(lambda: not threads(), "the end of the threads that wait", limit)


def test_reads_what_is_there_and_ends(store):
    stream = store.stream("p", partitions=3)
    stream.append_many([b"%d" % i for i in range(100)], keys=[b"%d" % i for i in range(100)])

    async def main():
        assert sorted(await take(stream.aread()), key=int) == [b"%d" % i for i in range(100)]
        assert len(await take(stream.aread(max_records=7))) == 7
        assert len(await take(stream.aread(partition=1, start=1))) == stream.next_offset(1) - 1
        with pytest.raises(OffsetOutOfRange):
            stream.aread(partition=0, start=1000)

    asyncio.run(main())


def test_follow_lets_the_loop_run_and_gets_what_comes(stream):
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.002)  # the loop ticks, while something else waits
                ticks += 1
                if ticks % 5 == 0 and ticks <= 50:
                    stream.append(b"%d" % ticks)

        ticking = asyncio.create_task(tick())
        found = await take(stream.aread(follow=True, max_records=10, timeout=20))
        ticking.cancel()
        assert found == [b"%d" % n for n in range(5, 51, 5)]
        await gone()

    asyncio.run(main())


def test_timeout_ends_it(stream):
    async def main():
        loop = asyncio.get_running_loop()
        stream.append(b"x")
        begun = loop.time()
        assert await take(stream.aread(follow=True, timeout=0.1)) == [b"x"]
        assert 0.1 <= loop.time() - begun < 10
        assert await take(stream.aread(follow=True, timeout=0)) == [b"x"]
        await gone()

    asyncio.run(main())


def test_cancelling_loses_nothing_and_leaves_nothing(stream):
    async def main():
        seen = []
        following = 0

        async def follow():
            nonlocal following
            async for batch in stream.aread(start=following, follow=True):
                following = batch.next_offset
                seen.extend(batch.values)

        for turn in range(5):
            reading = asyncio.create_task(follow())
            stream.append(b"%d" % turn)
            await auntil(lambda turn=turn: len(seen) > turn)
            await asyncio.sleep(0.01)  # it waits again; if not, this shows less
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        assert seen == [b"%d" % turn for turn in range(5)]
        await gone()

    asyncio.run(main())


def test_wait_for_ends_a_reader(stream):
    async def main():
        reader = stream.aread(follow=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(reader), 0.05)
        await reader.aclose()
        stream.append(b"x")
        assert await take(stream.aread()) == [b"x"]
        await gone()

    asyncio.run(main())


def test_two_readers_and_an_abandoned_one(store):
    stream = store.stream("p", partitions=2)

    async def main():
        async def write():
            for i in range(50):
                stream.append(b"%d" % i)
                await asyncio.sleep(0)

        abandoned = stream.aread(follow=True)
        one, two, _ = await asyncio.gather(
            take(stream.aread(follow=True, max_records=50)),
            take(stream.aread(partition=0, follow=True, max_records=25)),
            write(),
        )
        assert sorted(one, key=int) == [b"%d" % i for i in range(50)]
        assert len(two) == 25
        async for _ in abandoned:
            break
        await abandoned.aclose()
        await gone()

    asyncio.run(main())


def test_threads_and_loop_see_the_same(stream):
    async def main():
        writer = threading.Thread(
            target=lambda: [stream.append(b"%d" % i, durability="sync") for i in range(20)]
        )
        writer.start()
        found = await take(stream.aread(follow=True, durable=True, max_records=20, timeout=20))
        assert found == [b"%d" % i for i in range(20)]
        writer.join()
        await gone()

    asyncio.run(main())


@pytest.mark.parametrize("end", ["close", "drop"])
def test_reader_of_a_stream_that_goes_gets_closed(tmp_path, end):
    async def main():
        store = millstream.open(tmp_path / "s")
        stream = store.stream("s")
        reading = asyncio.create_task(take(stream.aread(follow=True)))
        await auntil(threads)
        if end == "close":
            await asyncio.to_thread(store.close)
        else:
            store.drop_stream("s")
        with pytest.raises(Closed):
            await asyncio.wait_for(reading, 20)
        store.close()
        await gone()

    asyncio.run(main())


def test_loop_that_ends_under_a_waiting_reader_is_quiet(stream):
    """The waiting thread called into a loop that had been closed."""

    async def main():
        reader = stream.aread(follow=True)
        task = asyncio.ensure_future(anext(reader))
        await auntil(threads)
        return task

    task = asyncio.run(main())  # cancels it
    assert task.cancelled()
    stream.append(b"x")
    for thread in threads():
        thread.join(10)
        assert not thread.is_alive()


def test_errors_of_a_wait_reach_the_reader(stream, monkeypatch):
    async def main():
        reader = stream.aread(follow=True)
        task = asyncio.ensure_future(anext(reader))
        await auntil(threads)
        monkeypatch.setattr(stream, "_prepare_wait", lambda: 1 / 0, raising=False)
        stream._wake()
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(task, 10)
        monkeypatch.undo()
        await gone()

    asyncio.run(main())


# --- queues and groups ----------------------------------------------------------------------------


@pytest.fixture
def queue(store):
    return store.queue("q", capacity=2)


def test_aget_is_a_coroutine_of_which_tasks_can_be_made(queue):
    async def main():
        got = queue.aget()
        assert asyncio.iscoroutine(got)
        queue.put(b"1")
        first = await got
        assert first.ack() is None and first.value == b"1"
        with pytest.raises(RuntimeError, match="already awaited"):
            await got

        made = [asyncio.create_task(queue.aget()), asyncio.ensure_future(queue.aget())]
        await asyncio.sleep(0)
        queue.put_many([b"2", b"3"])
        found = await asyncio.gather(*made)
        queue.ack_many(found)
        queue.put(b"4")
        found.append(await asyncio.wait_for(queue.aget(), 20))
        queue.put(b"5")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(queue.aget())
        found.append(task.result())
        assert sorted(message.value for message in found) == [b"2", b"3", b"4", b"5"]
        with pytest.raises(millstream.Empty):
            await asyncio.gather(queue.aget(timeout=0.01))
        queue.ack_many(found)
        async with queue.aget(timeout=0) as message:
            raise AssertionError(message)

    with pytest.raises(millstream.Empty):
        asyncio.run(main())


def test_aget_runs_by_itself_and_in_debug_mode(queue):
    queue.put_many([b"1", b"2"])
    assert asyncio.run(queue.aget()).value == b"1"
    assert asyncio.run(queue.aget(), debug=True).value == b"2"
    with pytest.raises(millstream.Empty):
        asyncio.run(queue.aget(timeout=0.01), debug=True)


def test_coroutine_that_is_not_awaited_is_warned_of_or_closed(queue):
    queue.aget().close()
    got = queue.aget()
    with pytest.warns(RuntimeWarning, match="never awaited"):
        del got


def wait_for_room(queue):
    queue.put_many([b"1", b"2"])
    return queue.aput(b"3", timeout=0.001)


async def poll_once(stream):
    with stream.consumer("g") as consumer:
        return await consumer.apoll(timeout=0.001)


WAITS = {
    "aget": lambda store: store.queue("q").aget(timeout=0.001),
    "aput": lambda store: wait_for_room(store.queue("full", capacity=2)),
    "aread": lambda store: take(store.stream("s").aread(follow=True, timeout=0.001)),
    "apoll": lambda store: poll_once(store.stream("s")),
}


@pytest.mark.parametrize("what", WAITS)
def test_no_thread_is_left_when_the_loop_ends(store, what):
    """300 of them left 115 to 230 threads behind."""
    for _ in range(10):
        for name in ("full", "q"):
            if name in store.queues():
                store.queue(name).purge()
        call = WAITS[what](store)
        with contextlib.suppress(millstream.Empty, millstream.QueueFull):
            asyncio.run(as_coroutine(call))
        assert threads() == []


async def as_coroutine(call):
    return await call


@pytest.mark.parametrize("what", ["aget", "async for", "apoll", "consumer"])
def test_waiting_for_ever_ends_with_the_loop(store, what):
    queue, stream = store.queue("q"), store.stream("s")

    async def wait():
        if what == "aget":
            await queue.aget()
        elif what == "async for":
            async for _ in queue:
                break
        else:
            with stream.consumer("g") as consumer:
                if what == "apoll":
                    await consumer.apoll(None)
                async for _ in consumer:
                    break

    async def main():
        tasks = [asyncio.create_task(wait()) for _ in range(3)]
        await auntil(threads)
        return tasks

    tasks = asyncio.run(main())  # cancels them
    assert all(task.cancelled() for task in tasks)
    assert threads() == []
    queue.put(b"x")
    assert queue.get(timeout=5).value == b"x"


def test_closing_the_store_ends_waits_and_threads(tmp_path):
    async def main():
        store = millstream.open(tmp_path / "s")
        getting = asyncio.create_task(store.queue("q").aget())
        polling = asyncio.create_task(store.stream("s").consumer("g").apoll(None))
        await auntil(lambda: len(threads()) == 2)
        await asyncio.to_thread(store.close)
        for task in (getting, polling):
            with pytest.raises(Closed):
                await asyncio.wait_for(task, 20)
        await gone()

    asyncio.run(main())


def test_loop_that_is_not_ended_in_order_keeps_its_thread_for_a_second_only(queue):
    loop = asyncio.new_event_loop()
    with pytest.raises(millstream.Empty):
        loop.run_until_complete(queue.aget(timeout=0.001))
    loop.close()
    for thread in threads():
        thread.join(20)
        assert not thread.is_alive()


def test_two_loops_wait_at_one_queue(queue):
    """Each has a thread of its own, and neither ends the other's."""
    found = []

    def wait():
        async def main():
            async with queue.aget(timeout=60) as message:
                found.append(message.value)

        asyncio.run(main())

    loops = [threading.Thread(target=wait) for _ in range(2)]
    for loop in loops:
        loop.start()
    queue.put_many([b"1", b"2"])
    for loop in loops:
        loop.join(60)
    assert sorted(found) == [b"1", b"2"]
    assert threads() == []


def test_cancelled_waits_lose_no_message_and_no_wake(store):
    queue = store.queue("many")

    async def main():
        waiting = [asyncio.create_task(queue.aget()) for _ in range(20)]
        await auntil(threads)
        queue.put_many([b"%d" % i for i in range(10)])
        for task in waiting[::2]:
            task.cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        found = [one for one in done if isinstance(one, millstream.Message)]
        queue.ack_many(found)
        while len(queue):
            async with queue.aget(timeout=20) as message:
                found.append(message)
        assert sorted(int(one.value) for one in found) == list(range(10))

    # Ten of twenty wait on, or fewer: whoever waits is served.
    asyncio.run(asyncio.wait_for(main(), 60))
