"""`aread`: as `read`, and the loop goes on."""

import asyncio
import threading

import pytest

import millstream
from millstream import Closed, OffsetOutOfRange


async def take(reader):
    return [value async for batch in reader for value in batch.values]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "millstream-aread"]


async def gone(limit=10.0):
    """Wait until no waiting thread is left."""
    end = asyncio.get_running_loop().time() + limit
    while threads():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.005)


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
                await asyncio.sleep(0.002)
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
            while len(seen) <= turn:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.01)  # it waits again
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
        await asyncio.sleep(0.02)
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
        await asyncio.sleep(0.02)
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
        await asyncio.sleep(0.02)
        monkeypatch.setattr(stream, "_prepare_wait", lambda: 1 / 0, raising=False)
        stream._wake()
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(task, 10)
        monkeypatch.undo()
        await gone()

    asyncio.run(main())
