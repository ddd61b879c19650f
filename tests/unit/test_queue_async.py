"""Coroutines put and get: what is cancelled loses nothing, and no thread stays behind."""

import asyncio
import concurrent.futures.thread
import threading

import pytest

import millstream

# --- asyncio --------------------------------------------------------------------------------------


def test_aput_and_aget(q):
    async def main():
        await q.aput(b"x", priority=1)
        async with q.aget(timeout=5) as m:
            assert m.value == b"x"
        with pytest.raises(millstream.Empty):
            await q.aget(timeout=0.05)
        getting = asyncio.create_task(take())
        await asyncio.sleep(0.05)  # it waits by now; if not, this shows less and is never wrong
        q.put(b"y")
        assert await asyncio.wait_for(getting, 2) == b"y"

    async def take():
        async with q.aget() as m:
            return m.value

    asyncio.run(main())
    assert len(q) == 0


def test_cancelled_aget_loses_nothing(q):
    async def main():
        for i in range(50):
            getting = asyncio.create_task(q.aget())
            await asyncio.sleep(0.001)  # the moment that it is cancelled is what varies
            q.put(b"%d" % i)
            getting.cancel()
            try:
                (await getting).ack()
            except asyncio.CancelledError:
                q.get(timeout=60).ack()
        assert len(q) == 0

    asyncio.run(main())


def test_async_for_leases_one_at_a_time(q):
    async def main():
        q.put_many([b"a", b"b", b"c"])
        seen = []
        async for m in q:
            assert q.stats().leased == 1
            seen.append(m.value)
            m.ack()
            if len(seen) == 3:
                break
        assert seen == [b"a", b"b", b"c"]

    asyncio.run(main())


def test_aput_at_sync_without_a_thread_is_a_storage_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    with millstream.open(tmp_path / "store", durability="sync") as store:
        q = store.queue("q")
        with monkeypatch.context() as patch:
            patch.setattr(threading, "_start_new_thread", refuse)
            with pytest.raises(millstream.StorageError, match="no thread"):
                asyncio.run(q.aput(b"1"))
        assert len(q) == 0
        asyncio.run(q.aput(b"2"))
        assert [m.value for m in q.get_many(2)] == [b"2"]


def test_aput_at_sync_takes_no_lock_that_a_fork_waits_for(tmp_path):
    with millstream.open(tmp_path / "store", durability="sync") as store:
        q = store.queue("q")
        with concurrent.futures.thread._global_shutdown_lock:  # os.fork takes it before it forks
            thread = threading.Thread(target=lambda: asyncio.run(q.aput(b"1")), daemon=True)
            thread.start()
            thread.join(30)
            assert len(q) == 1
        thread.join()


def test_many_aputs_at_sync_at_once_and_their_threads_end_with_the_loop(tmp_path):
    async def put_all(q):
        return await asyncio.gather(*(q.aput(b"%d" % i) for i in range(100)))

    with millstream.open(tmp_path / "store", durability="sync") as store:
        q = store.queue("q")
        assert len(set(asyncio.run(put_all(q)))) == len(q) == 100
        assert not [one for one in threading.enumerate() if one.name == "millstream-put"]


def test_aput_waits_for_room_and_cancelled_puts_nothing(store):
    q = store.queue("small", capacity=1)

    async def main():
        await q.aput(b"1")
        with pytest.raises(millstream.QueueFull):
            await q.aput(b"2", timeout=0.05)
        waiting = asyncio.create_task(q.aput(b"3"))
        await asyncio.sleep(0.05)  # it waits by now; if not, this shows less and is never wrong
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        waiting = asyncio.create_task(q.aput(b"4"))
        await asyncio.sleep(0.05)  # it waits by now; if not, this shows less and is never wrong
        q.get(timeout=0).ack()
        await asyncio.wait_for(waiting, 2)

    asyncio.run(main())
    assert q.get(timeout=0).value == b"4"
