"""What every engine must do, as a pytest plugin: the tests follow from the capabilities it says.

In a test module, with ``pytest_plugins = ["millstream.testing.conformance"]`` in the topmost
`conftest.py`::

    from millstream.testing.conformance import QueueCases, StreamCases

    class TestStreams(StreamCases):
        address = "toy://127.0.0.1:1234"

    class TestQueues(QueueCases):
        address = "toy://127.0.0.1:1234"

An `address` that is known only when a server runs is a fixture of that name, of session scope.
Nothing is skipped: where the engine says "none", the call that would need the capability must raise
`millstream.Unsupported`, and where the engine can count what it sends (`sent`), before a byte of
it. What is "emulated" is consented to, and must be refused without that.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

import millstream
from millstream.capabilities import NAMES
from millstream.testing.proxy import Proxy

if TYPE_CHECKING:
    from millstream import Store

__all__ = ["QueueCases", "StreamCases", "needs"]

YEAR_2013 = 1_357_000_000_000_000
LEASE = 1.0
WAIT = 15.0
"""Seconds for what must come: an engine that is slow under load is not wrong."""

Call: TypeAlias = Callable[[Any], object]
Case: TypeAlias = Callable[..., None]

TO_STREAM: dict[str, Call] = {
    "stream.null": lambda stream: stream.append(None),
    "stream.headers": lambda stream: stream.append(b"x", headers={"h": b"1"}),
    "stream.timestamp": lambda stream: stream.append(b"x", timestamp=YEAR_2013),
    "stream.partitions": lambda stream: stream.append(b"x", key=b"k"),
    "stream.add_partitions": lambda stream: stream.add_partitions(5),
    "stream.start_at_offset": lambda stream: list(stream.read(start=0)),
    "stream.start_at_time": lambda stream: stream.offset_at(YEAR_2013, 0),
    "stream.get": lambda stream: stream.get(0, 0),
    "stream.group": lambda stream: stream.consumer("g"),
    "stream.delete_before": lambda stream: stream.delete_before(millstream.Position(0, 1, 1)),
    "stream.view": lambda stream: stream.view(),
    "stream.producer": lambda stream: stream.producer("p"),
    "durability.process": lambda stream: stream.append(b"x", durability="process"),
    "durability.interval": lambda stream: stream.append(b"x", durability="interval"),
    "durability.sync": lambda stream: stream.append(b"x", durability="sync"),
}
"""Calls of a stream that need a capability."""
TO_QUEUE: dict[str, Call] = {
    "queue.priority": lambda queue: queue.put(b"x", priority=1),
    "queue.delay": lambda queue: queue.put(b"x", delay=60.0),
    "queue.ttl": lambda queue: queue.put(b"x", ttl=60.0),
    "queue.dedup": lambda queue: queue.put(b"x", dedup_id="d"),
    "queue.peek": lambda queue: queue.peek(),
    "queue.cancel": lambda queue: queue.cancel(1),
    "queue.purge": lambda queue: queue.purge(),
    "queue.depth": lambda queue: queue.stats(),
    "queue.pause": lambda queue: queue.pause(),
    "queue.worker": lambda queue: queue.worker()(print),
    "queue.dead_letters": lambda queue: queue.dead.list(),
    "queue.redrive": lambda queue: queue.dead.redrive(),
}
"""Calls of a queue that need one."""
TO_MESSAGE: dict[str, Call] = {
    "queue.extend": lambda message: message.extend(),
    "queue.nack_delay": lambda message: message.nack(delay=1.0),
    "queue.release": lambda message: message.release(),
}
"""Calls of a leased message that need one."""
TO_STORE: dict[str, Call] = {
    "stream.retention": lambda store: store.stream("x", retention=millstream.Retention(age=60)),
    "stream.compaction": lambda store: store.stream("x", compact=millstream.Compaction()),
    "stream.transaction": lambda store: store.transaction(),
    "queue.key_order": lambda store: store.queue("x", ordering="key"),
    "queue.capacity": lambda store: store.queue("x", capacity=10),
}
"""Calls of a store that need one."""


def needs(*names: str) -> Callable[[Case], Case]:
    """Mark a case with the capabilities that it tests; where one is none, it must be refused."""

    def mark(case: Case) -> Case:
        return pytest.mark.capability(*names)(case)

    return mark


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the mark."""
    config.addinivalue_line("markers", "capability(*names): what an engine must have for it")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a case, or assert that its capability is refused."""
    mark = pyfuncitem.get_closest_marker("capability")
    cases = pyfuncitem.instance
    if mark is None or not isinstance(cases, _Cases):
        return None
    store: Any = pyfuncitem.funcargs["store"]
    lacking = [name for name in mark.args if store.capabilities[name].level == "none"]
    if not lacking:
        return None
    with pytest.raises(millstream.Unsupported) as caught:
        store.require(*mark.args)
    assert caught.value.capability == lacking[0]
    return True


class _Cases:
    """Base of the cases: a store of the engine, and names that nobody else uses."""

    address: Any = None
    """Where the engine is: a class attribute, or a fixture of session scope."""
    emulate = True
    """Consent to what the engine emulates."""

    @pytest.fixture(name="store")
    def _store(self, request: pytest.FixtureRequest) -> Iterator[Store]:
        address = self.address
        if not isinstance(address, str):
            address = request.getfixturevalue("address")
        with millstream.open(address) as store:
            yield store

    @pytest.fixture(name="name")
    def _name(self) -> str:
        return f"c{uuid.uuid4().hex[:16]}"

    def stream(self, store: Any, name: str, **settings: Any) -> Any:
        """A new stream, with consent to what is emulated."""
        return store.stream(name, emulate=emulated(store, "stream"), **settings)

    def queue(self, store: Any, name: str, **settings: Any) -> Any:
        """A new queue, with consent to what is emulated."""
        return store.queue(name, emulate=emulated(store, "queue"), **settings)

    def address_of(self, store: Any) -> str:
        """The address that opens the store once more, in another process too."""
        return self.address if isinstance(self.address, str) else str(store.path)

    def restart(self, request: pytest.FixtureRequest) -> None:
        """Kill the server and start it again; an engine with a server says here how."""

    def sent(self, store: Any) -> Any:
        """Bytes that the engine has sent so far; an engine that counts them says so here."""
        return 0


def emulated(store: Any, kind: str) -> set[str]:
    """What an engine emulates of streams or queues, as `emulate` takes it."""
    found = {name for name, one in store.capabilities.items() if one.level == "emulated"}
    return {name.partition(".")[2] for name in found if name.startswith(f"{kind}.")}


def refused(name: str, store: Any, call: Callable[[], object], sent: Callable[[Any], Any]) -> None:
    """Assert that a call raises `Unsupported` for this capability, and sends nothing."""
    before = sent(store)
    with pytest.raises(millstream.Unsupported) as caught:
        call()
    assert sent(store) == before
    assert caught.value.capability == name
    assert caught.value.engine == store.engine
    assert caught.value.instead, f"{name}: says not what to do"


def values_of(stream: Any, **how: Any) -> list[bytes | None]:
    """All values of a stream."""
    return [value for batch in stream.read(**how) for value in batch.values]


class StreamCases(_Cases):
    """The cases of streams. Subclass it with an `address`."""

    @pytest.mark.parametrize("capability", sorted({**TO_STREAM, **TO_STORE}))
    def test_what_it_cannot_do_it_refuses(self, store: Any, name: str, capability: str) -> None:
        """What it cannot do it refuses."""
        level = store.capabilities[capability].level
        if level == "native" or not capability.startswith(("stream.", "durability.")):
            store.require(capability) if level != "none" else None
            return
        if capability in TO_STORE:
            refused(capability, store, lambda: TO_STORE[capability](store), self.sent)
            return
        stream = store.stream(name)
        try:
            refused(capability, store, lambda: TO_STREAM[capability](stream), self.sent)
        finally:
            store.drop_stream(name)

    def test_every_capability_is_said(self, store: Any) -> None:
        """Every capability is said."""
        assert set(store.capabilities) == set(NAMES)
        for capability, said in store.capabilities.items():
            assert said.level in ("native", "emulated", "none"), capability
            assert said.level == "native" or said.note, f"{capability}: says not why, or what else"

    @needs("stream.null", "stream.headers")
    def test_values_come_back_as_they_were(self, store: Any, name: str) -> None:
        """Values come back as they were."""
        stream = self.stream(store, name)
        values = [b"", None, b"\x00\xff\r\n", b"x" * 200_000, "ä".encode(), b"last"]
        keys = [b"k", None, b"", b"\x00", b"k", None]
        headers = [{"h": b"1"}, None, {"ä": b"\xff\x00"}, {}, {"a": b"", "b": b"2"}, None]
        try:
            stream.append_many(values, keys=keys, headers=headers, partition=0)
            batches = list(stream.read())
            assert [one for batch in batches for one in batch.values] == values
            assert [one for batch in batches for one in batch.keys] == keys
            found = [one for batch in batches for one in batch.headers]
            assert found == [one or {} for one in headers]
        finally:
            store.drop_stream(name)

    def test_lists_numpy_and_arrow_are_appended(self, store: Any, name: str) -> None:
        """Lists numpy and arrow are appended."""
        numpy = pytest.importorskip("numpy")
        pyarrow = pytest.importorskip("pyarrow")
        stream = self.stream(store, name)
        try:
            stream.append_many([b"a", b"b"])
            stream.append_many(numpy.array([1, 2], "<u2"))
            stream.append_many(pyarrow.array([b"c", b"d"]))
            table = pyarrow.table({"value": [b"e"], "key": [b"k"]})
            stream.append_arrow(table, key="key")
            found = values_of(stream)
            assert found == [b"a", b"b", b"\x01\x00", b"\x02\x00", b"c", b"d", b"e"]
            tables = [pyarrow.Table.from_batches([batch.to_arrow()]) for batch in stream.read()]
            whole = pyarrow.concat_tables(tables)
            assert whole["value"].to_pylist() == found
            assert whole["offset"].to_pylist() == list(range(7))
        finally:
            store.drop_stream(name)

    @needs("stream.timestamp")
    def test_a_record_of_2013_is_there_later(self, store: Any, name: str) -> None:
        """A record of 2013 is there later."""
        stream = self.stream(store, name)
        try:
            stream.append_many([b"old", b"older"], timestamps=[YEAR_2013, YEAR_2013 - 7])
            stream.append(b"new")
            time.sleep(1.5)  # brokers look each second for what is too old
            found = [int(one) for batch in stream.read() for one in batch.timestamps]
            assert found[:2] == [YEAR_2013, YEAR_2013 - 7]
            assert abs(found[2] / 1e6 - time.time()) < 60
        finally:
            store.drop_stream(name)

    @needs("stream.partitions")
    def test_keys_go_where_they_go_everywhere(self, store: Any, name: str) -> None:
        """Keys go where they go everywhere."""
        stream = self.stream(store, name, partitions=4)
        keys = [b"%d" % number for number in range(40)]
        try:
            with millstream.temporary() as local:
                same = local.stream("s", partitions=4)
                assert [stream.partition_for(key) for key in keys] == [
                    same.partition_for(key) for key in keys
                ]
            stream.append_many(keys, keys=keys)
            assert stream.append(b"0", key=b"0").partition == stream.partition_for(b"0")
            for partition in range(4):
                found = values_of(stream, partition=partition)
                mine = [key for key in keys if stream.partition_for(key) == partition]
                assert found[: len(mine)] == mine  # in their order
                assert set(found[len(mine) :]) <= {b"0"}
        finally:
            store.drop_stream(name)

    @needs("stream.start_at_offset", "stream.get")
    def test_reading_begins_where_it_is_told(self, store: Any, name: str) -> None:
        """Reading begins where it is told."""
        stream = self.stream(store, name)
        try:
            assert (stream.first_offset(0), stream.next_offset(0)) == (0, 0)
            assert values_of(stream) == []
            stream.append_many([b"a", b"b", b"c", b"d"])
            assert (stream.first_offset(0), stream.next_offset(0)) == (0, 4)
            assert values_of(stream, partition=0, start=2) == [b"c", b"d"]
            assert values_of(stream, partition=0, start=4) == []
            assert values_of(stream, partition=0, start="latest") == []
            assert values_of(stream, max_records=3) == [b"a", b"b", b"c"]
            for beyond in (5, 1000):
                with pytest.raises(millstream.OffsetOutOfRange) as caught:
                    values_of(stream, partition=0, start=beyond)
                assert (caught.value.first, caught.value.next) == (0, 4)
            assert stream.get(0, 1).value == b"b"
            with pytest.raises(millstream.OffsetOutOfRange):
                stream.get(0, 4)
        finally:
            store.drop_stream(name)

    @needs("stream.start_at_time", "stream.timestamp")
    def test_reading_begins_at_a_time(self, store: Any, name: str) -> None:
        """Reading begins at a time."""
        stream = self.stream(store, name)
        try:
            stream.append_many([b"a", b"b"], timestamps=[1_000_000, 2_000_000])
            middle = datetime.fromtimestamp(2, UTC)
            assert values_of(stream, start=middle) == [b"b"]
            assert stream.offset_at(middle, 0) == 1
            assert stream.offset_at(datetime.fromtimestamp(1e9, UTC), 0) == 2
        finally:
            store.drop_stream(name)

    @needs("stream.producer")
    def test_what_is_sent_again_adds_nothing(self, store: Any, name: str) -> None:
        """What is sent again adds nothing."""
        stream = self.stream(store, name)
        try:
            producer = stream.producer("p")
            assert producer.last_sequences == (-1,)
            assert len(producer.append_many([b"0", b"1", b"2"], first_sequence=0)) == 1
            assert producer.append_many([b"1", b"2"], first_sequence=1) == []
            producer.append_many([b"2", b"9"], sequences=[2, 9])
            producer.close()
            other = stream.producer("p")
            assert other.last_sequences == (9,)
            stream.append(b"of somebody else")
            other.append_many([b"9", b"10"], first_sequence=9)
            assert values_of(stream) == [b"0", b"1", b"2", b"9", b"of somebody else", b"10"]
        finally:
            store.drop_stream(name)

    @needs("stream.group")
    def test_a_group_goes_on_where_it_committed(self, store: Any, name: str) -> None:
        """A group goes on where it committed."""
        stream = self.stream(store, name)
        try:
            stream.append_many([b"a", b"b", b"c"])
            with stream.consumer("g", max_records=2, timeout=WAIT) as consumer:
                assert consumer.assignment == [0] or consumer.poll(WAIT) is not None
            assert stream.groups() == ["g"]
            with stream.consumer("g", max_records=2) as consumer:
                batch = consumer.poll(WAIT)
                assert batch is not None and list(batch.values) == [b"a", b"b"]
                consumer.commit()
                assert consumer.poll(WAIT) is not None  # and is not committed
            assert stream.group("g").lag() == 1
            assert stream.group("g").positions()[0].offset == 2
            with stream.consumer("g") as consumer:
                batch = consumer.poll(WAIT)
                assert batch is not None and list(batch.values) == [b"c"]
                consumer.seek(0, partition=0)
                batch = consumer.poll(WAIT)
                assert batch is not None and batch.first_offset == 0
                with pytest.raises(millstream.InvalidArgument):
                    stream.group("g").seek("latest")  # it has a member
            stream.group("g").seek(3, partition=0)
            assert stream.group("g").lag() == 0
            with pytest.raises(millstream.NotFound):
                stream.group("no-such")
            stream.group("g").remove()
            assert stream.groups() == []
        finally:
            store.drop_stream(name)

    @needs("stream.fenced_commit")
    def test_who_lost_a_partition_cannot_commit(self, store: Any, name: str) -> None:
        """Who lost a partition cannot commit."""
        stream = self.stream(store, name)
        try:
            stream.append_many([b"a", b"b"])
            first = stream.consumer("g", max_records=1, max_processing=0.5)
            batch = first.poll(WAIT)
            assert batch is not None
            with stream.consumer("g", max_records=1) as second:
                took = second.poll(WAIT)  # the first one hangs
                assert took is not None and list(took.values) == [b"a"]
                with pytest.raises(millstream.Fenced):
                    first.commit(batch)
                second.commit()
            first.close()
            assert stream.group("g").lag() == 1
        finally:
            store.drop_stream(name)

    @needs("stream.delete_before", "stream.start_at_offset")
    def test_what_was_removed_cannot_be_read(self, store: Any, name: str) -> None:
        """What was removed cannot be read."""
        stream = self.stream(store, name)
        try:
            stream.append_many([b"a", b"b", b"c"])
            first = stream.delete_before(millstream.Position(0, 1, 2))
            assert first <= 2  # an engine may remove less, as whole files
            assert stream.first_offset(0) == first
            assert values_of(stream) == [b"a", b"b", b"c"][first:]
            if first:
                with pytest.raises(millstream.OffsetOutOfRange) as caught:
                    values_of(stream, partition=0, start=0)
                assert (caught.value.first, caught.value.next) == (first, 3)
                found = values_of(stream, partition=0, start=0, on_lost="earliest")
                assert found == [b"a", b"b", b"c"][first:]
        finally:
            store.drop_stream(name)

    @needs("stream.add_partitions", "stream.partitions")
    def test_partitions_are_added(self, store: Any, name: str) -> None:
        """Partitions are added."""
        stream = self.stream(store, name, partitions=2)
        try:
            stream.append(b"before", partition=1)
            assert stream.add_partitions(2) == 4
            assert stream.partitions == 4
            for number in range(20):
                key = b"%d" % number
                position = stream.append(key, key=key)
                assert position.partition == stream.partition_for(key)
            assert len(values_of(stream)) == 21
            assert values_of(stream, partition=1)[0] == b"before"
        finally:
            store.drop_stream(name)

    @pytest.mark.parametrize("level", ["process", "interval", "sync"])
    def test_durability_is_given_or_refused(self, store: Any, name: str, level: str) -> None:
        """Durability is given or refused."""
        if store.capabilities[f"durability.{level}"].level == "none":
            refused(
                f"durability.{level}",
                store,
                lambda: store.stream(name, durability=level),
                self.sent,
            )
            assert name not in store.streams()
            return
        stream = self.stream(store, name, durability=level)
        try:
            assert stream.append(b"x").offset == 0
            assert stream.append(b"y", durability=level).offset == 1
            assert values_of(stream) == [b"x", b"y"]
        finally:
            store.drop_stream(name)

    @needs("stream.atomic_append")
    def test_an_atomic_append_is_as_large_as_it_says(self, store: Any, name: str) -> None:
        """An atomic append is as large as it says."""
        most = int(store.capabilities["stream.atomic_append"].limits.get("records", 1000))
        stream = self.stream(store, name)
        try:
            for count in (most, most + 1):
                first = stream.next_offset(0)
                [span] = stream.append_many([b"x"] * count)
                assert (span.first_offset, span.count) == (first, count)
            assert stream.next_offset(0) == 2 * most + 1
        finally:
            store.drop_stream(name)

    @needs("stream.transaction")
    def test_a_transaction_is_seen_whole_at_its_end(self, store: Any, name: str) -> None:
        """A transaction is seen whole at its end."""
        stream, other = self.stream(store, name, partitions=2), self.stream(store, f"{name}b")
        try:
            with store.transaction() as tx:
                tx.append_many(stream, [b"a", b"b"], partition=0)
                tx.append(stream, b"c", partition=1, key=b"k", headers={"h": b"1"})
                tx.append(other, b"d", timestamp=YEAR_2013)
                assert values_of(stream) == values_of(other) == []
            assert values_of(stream, partition=0) == [b"a", b"b"]
            assert values_of(stream, partition=1) == [b"c"]
            assert [int(one) for batch in other.read() for one in batch.timestamps] == [YEAR_2013]
            with pytest.raises(ZeroDivisionError), store.transaction() as tx:
                tx.append(stream, b"never", partition=0)
                raise ZeroDivisionError
            with store.transaction() as tx:
                tx.append(stream, b"never", partition=0)
                tx.rollback()
            assert values_of(stream, partition=0) == [b"a", b"b"]
        finally:
            store.drop_stream(name)
            store.drop_stream(f"{name}b")

    @needs("stream.transaction", "stream.group")
    def test_positions_are_committed_with_what_was_made(self, store: Any, name: str) -> None:
        """Positions are committed with what was made."""
        stream, made = self.stream(store, name), self.stream(store, f"{name}b")
        try:
            with store.transaction() as tx:
                tx.append_many(stream, [b"1", b"2", b"3"])
            with stream.consumer("g", delivery="exactly_once", max_records=2) as consumer:
                for fails in (True, False, False):
                    try:
                        with store.transaction() as tx:
                            batch = consumer.poll(WAIT)
                            assert batch is not None
                            tx.append_many(made, list(batch.values))
                            tx.commit(consumer)
                            1 / (not fails)
                    except ZeroDivisionError:
                        assert fails
                assert consumer.lag() == 0
            assert values_of(made) == [b"1", b"2", b"3"]
            assert stream.group("g").lag() == 0  # marks of transactions are no records
        finally:
            store.drop_stream(name)
            store.drop_stream(f"{name}b")

    @needs("stream.transaction", "stream.fenced_commit")
    def test_who_was_replaced_commits_no_transaction(self, store: Any, name: str) -> None:
        """Who was replaced commits no transaction."""
        stream, made = self.stream(store, name), self.stream(store, f"{name}b")
        try:
            stream.append(b"1")
            zombie = stream.consumer("g", delivery="exactly_once", max_processing=0.5)
            batch = zombie.poll(WAIT)
            assert batch is not None
            with stream.consumer("g", delivery="exactly_once") as heir:
                assert heir.poll(WAIT) is not None  # the first one hangs
                with (
                    pytest.raises((millstream.Aborted, millstream.Fenced)),
                    store.transaction() as tx,
                ):
                    tx.append_many(made, list(batch.values))
                    tx.commit(zombie)
            zombie.close()
            assert values_of(made) == []
        finally:
            store.drop_stream(name)
            store.drop_stream(f"{name}b")

    @needs("stream.rebalance", "stream.group")
    def test_members_share_the_partitions(self, store: Any, name: str) -> None:
        """Members share the partitions."""
        stream = self.stream(store, name, partitions=2)
        try:
            first, second = stream.consumer("g"), stream.consumer("g")

            def share(*wanted: int) -> None:
                end = time.monotonic() + 2 * WAIT
                while (found := [len(one.assignment) for one in (first, second)]) != [*wanted]:
                    assert time.monotonic() < end, found
                    for consumer in (first, second):
                        if not consumer.closed:
                            consumer.poll(0.01)

            share(1, 1)
            assert sorted(first.assignment + second.assignment) == [0, 1]
            second.close()
            share(2, 0)
            first.close()
        finally:
            store.drop_stream(name)


class QueueCases(_Cases):
    """The cases of queues. Subclass it with an `address`."""

    @pytest.mark.parametrize("capability", sorted({**TO_QUEUE, **TO_MESSAGE, **TO_STORE}))
    def test_what_it_cannot_do_it_refuses(self, store: Any, name: str, capability: str) -> None:
        """What it cannot do it refuses."""
        level = store.capabilities[capability].level
        if level == "native" or not capability.startswith("queue."):
            store.require(capability) if level != "none" else None
            return
        if capability in TO_STORE:
            refused(capability, store, lambda: TO_STORE[capability](store), self.sent)
            return
        if store.capabilities["queue.lease"].level == "none":  # it has no queues at all
            refused("queue.lease", store, lambda: store.queue(name), self.sent)
            return
        queue = store.queue(name)
        try:
            if capability in TO_MESSAGE:
                queue.put(b"x")
                message = queue.get(timeout=WAIT)
                refused(capability, store, lambda: TO_MESSAGE[capability](message), self.sent)
                message.ack()
            else:
                refused(capability, store, lambda: TO_QUEUE[capability](queue), self.sent)
        finally:
            store.drop_queue(name)

    @needs("queue.lease")
    def test_a_message_is_done_once(self, store: Any, name: str) -> None:
        """A message is done once."""
        queue = self.queue(store, name)
        try:
            number = queue.put(b"\x00\xff", key=b"k", headers={"h": b"1"})
            with queue.get(timeout=WAIT) as message:
                assert (message.id, message.value, message.key) == (number, b"\x00\xff", b"k")
                assert (message.headers, message.attempt) == ({"h": b"1"}, 1)
            queue.put_many([b"a", b"b"])
            assert sorted(one.value for one in self.taken(queue, 2)) == [b"a", b"b"]
            with pytest.raises(millstream.Empty):
                queue.get(timeout=0.2)
        finally:
            store.drop_queue(name)

    def taken(self, queue: Any, count: int) -> list[Any]:
        """So many messages, acknowledged."""
        found: list[Any] = []
        while len(found) < count:
            message = queue.get(timeout=WAIT)
            message.ack()
            found.append(message)
        return found

    @needs("queue.lease")
    def test_a_lease_is_as_long_as_it_says(self, store: Any, name: str) -> None:
        """A lease is as long as it says."""
        lease = 3 * LEASE  # a busy machine is late by less than a tenth of it
        queue = self.queue(store, name, lease=lease)
        try:
            queue.put_many([b"a", b"b", b"c"])
            began = {}
            for _ in range(3):
                began[queue.get(timeout=WAIT).id] = time.monotonic()
            took = []
            for _ in range(3):
                again = queue.get(timeout=WAIT)
                took.append(time.monotonic() - began.pop(again.id))
                again.ack()
            assert 0.9 * lease <= min(took) <= 1.1 * lease, took  # the others waited their turn
        finally:
            store.drop_queue(name)

    @needs("queue.lease", "queue.attempts", "queue.hang_counted", "queue.dead_letters")
    def test_a_holder_that_hangs_counts(self, store: Any, name: str) -> None:
        """A holder that hangs counts."""
        policy = millstream.RetryPolicy(max_attempts=2, backoff=0.0, jitter=0.0)
        queue = self.queue(store, name, retry=policy, lease=LEASE)
        try:
            queue.put(b"hangs")
            hung = [queue.get(timeout=WAIT) for _ in range(2)]  # and its leases run out
            [letter] = self.letters(queue, 1)
            assert (letter.value, letter.reason) == (b"hangs", "the lease ran out")
            assert [one.attempt for one in hung] == [1, 2]
            assert queue.dead.purge() == 1
        finally:
            store.drop_queue(name)

    @needs("queue.lease")
    def test_one_bad_acknowledgement_spares_the_others(self, store: Any, name: str) -> None:
        """One bad acknowledgement spares the others."""
        queue = self.queue(store, name, lease=LEASE)
        try:
            queue.put(b"late")
            late = queue.get(timeout=WAIT)
            held = [queue.get(timeout=WAIT)]  # its lease is over
            queue.put_many([b"a", b"b"])
            held += [queue.get(timeout=WAIT) for _ in range(2)]
            assert queue.ack_many([held[0], late, held[1], held[2]]) == [late]
            with pytest.raises(millstream.Empty):
                queue.get(timeout=1.5 * LEASE)  # nothing comes again
        finally:
            store.drop_queue(name)

    @needs("queue.fenced_ack")
    def test_a_late_acknowledgement_is_refused(self, store: Any, name: str) -> None:
        """A late acknowledgement is refused."""
        queue = self.queue(store, name, lease=LEASE)
        try:
            queue.put_many([b"late", b"other"])
            late, other = queue.get(timeout=WAIT), queue.get(timeout=WAIT)
            other.ack()
            again = queue.get(timeout=WAIT)
            with pytest.raises(millstream.LeaseLost):
                late.ack()
            again.ack()
        finally:
            store.drop_queue(name)

    @needs("queue.nack_delay", "queue.attempts")
    def test_a_failure_is_counted_and_comes_later(self, store: Any, name: str) -> None:
        """A failure is counted and comes later."""
        queue = self.queue(store, name)
        try:
            queue.put(b"x")
            queue.get(timeout=WAIT).nack(delay=0.5)
            began = time.monotonic()
            again = queue.get(timeout=WAIT)
            assert time.monotonic() - began > 0.3
            assert again.attempt == 2
            again.ack()
        finally:
            store.drop_queue(name)

    @needs("queue.attempts")
    def test_a_failure_is_counted(self, store: Any, name: str) -> None:
        """A failure is counted."""
        policy = millstream.RetryPolicy(max_attempts=5, backoff=0.0, jitter=0.0)
        queue = self.queue(store, name, retry=policy)
        try:
            queue.put(b"x")
            for attempt in (1, 2, 3):
                message = queue.get(timeout=WAIT)
                assert message.attempt == attempt
                message.nack()
            queue.get(timeout=WAIT).ack()
        finally:
            store.drop_queue(name)

    @needs("queue.release", "queue.attempts")
    def test_what_is_released_is_not_counted(self, store: Any, name: str) -> None:
        """What is released is not counted."""
        policy = millstream.RetryPolicy(max_attempts=2, backoff=0.0, jitter=0.0)
        queue = self.queue(store, name, retry=policy)
        try:
            queue.put(b"x")
            for _ in range(4):
                message = queue.get(timeout=WAIT)
                assert message.attempt == 1
                message.release()
            queue.get(timeout=WAIT).nack()
            again = queue.get(timeout=WAIT)
            assert again.attempt == 2
            again.ack()
        finally:
            store.drop_queue(name)

    @needs("queue.dead_letters", "queue.attempts", "queue.redrive")
    def test_after_the_last_attempt_it_is_a_dead_letter(self, store: Any, name: str) -> None:
        """After the last attempt it is a dead letter."""
        policy = millstream.RetryPolicy(max_attempts=2, backoff=0.0, jitter=0.0)
        queue = self.queue(store, name, retry=policy, lease=LEASE)
        try:
            queue.put(b"fails", key=b"k", headers={"h": b"1"})
            for _ in range(2):
                queue.get(timeout=WAIT).nack(delay=0.0, reason="no luck")
            [letter] = self.letters(queue, 1)
            assert (letter.value, letter.key, letter.headers) == (b"fails", b"k", {"h": b"1"})
            assert (letter.reason, letter.last_error) == ("failed", "no luck")
            assert queue.dead.redrive(letter.id) == 1
            with queue.get(timeout=WAIT) as message:
                assert (message.value, message.attempt) == (b"fails", 1)
            queue.put(b"poison")
            queue.get(timeout=WAIT).reject("never")
            [letter] = self.letters(queue, 1)
            assert (letter.value, letter.reason, letter.last_error) == (
                b"poison", "never", "never",
            )  # fmt: skip
            assert (queue.dead.purge(), len(queue.dead)) == (1, 0)
        finally:
            store.drop_queue(name)

    def letters(self, queue: Any, count: int) -> list[Any]:
        """The dead letters, once there are so many."""
        end = time.monotonic() + WAIT
        while len(queue.dead) < count and time.monotonic() < end:
            with pytest.raises(millstream.Empty):
                queue.get(timeout=0.1)
        found: list[Any] = queue.dead.list()
        return found

    @needs("queue.delay")
    def test_a_short_delay_is_not_held_up_by_a_long_one(self, store: Any, name: str) -> None:
        """A short delay is not held up by a long one."""
        queue = self.queue(store, name)
        try:
            began = time.monotonic()
            queue.put(b"long", delay=2.0)
            queue.put(b"short", delay=0.5)
            queue.put(b"at", at=int((time.time() + 1.2) * 1e6))
            queue.put(b"now")
            found = [one.value for one in self.taken(queue, 4)]
            assert found == [b"now", b"short", b"at", b"long"]
            assert time.monotonic() - began >= 1.9
            at = int((time.time() + 0.5) * 1e6)
            queue.put_many([millstream.Put(b"one", at=at), millstream.Put(b"two", at=at)])
            assert {one.value for one in self.taken(queue, 2)} == {b"one", b"two"}
        finally:
            store.drop_queue(name)

    @needs("queue.dedup")
    def test_a_dedup_id_is_stored_once_in_its_window(self, store: Any, name: str) -> None:
        """A dedup id is stored once in its window."""
        queue = self.queue(store, name, dedup_window=1.0)
        try:
            number = queue.put(b"a", dedup_id="d")
            assert queue.put(b"b", dedup_id="d") == number
            time.sleep(1.6)  # the window ends
            assert queue.put(b"c", dedup_id="d") != number
            assert [one.value for one in self.taken(queue, 2)] == [b"a", b"c"]
        finally:
            store.drop_queue(name)

    @needs("queue.priority")
    def test_priorities_are_strict(self, store: Any, name: str) -> None:
        """Priorities are strict."""
        queue = self.queue(store, name, priorities=3)
        try:
            for number in range(9):
                queue.put(b"%d" % number, priority=number % 3)
            found = [one.value for one in self.taken(queue, 9)]
            assert found == [b"0", b"3", b"6", b"1", b"4", b"7", b"2", b"5", b"8"]
        finally:
            store.drop_queue(name)

    @needs("queue.capacity")
    def test_a_full_queue_refuses(self, store: Any, name: str) -> None:
        """A full queue refuses."""
        queue = self.queue(store, name, capacity=3)
        try:
            for _ in range(3):
                queue.put(b"x", timeout=0)
            with pytest.raises(millstream.QueueFull):
                queue.put(b"y", timeout=0)
            queue.get(timeout=WAIT).ack()
            queue.put(b"z", timeout=WAIT)
            with pytest.raises(millstream.QueueFull):
                queue.put(b"y", timeout=0)
            assert [one.value for one in self.taken(queue, 3)] == [b"x", b"x", b"z"]
        finally:
            store.drop_queue(name)

    @needs("queue.key_order")
    def test_a_key_keeps_its_order_when_its_holder_dies(self, store: Any, name: str) -> None:
        """A key keeps its order when its holder dies."""
        queue = self.queue(store, name, ordering="key", lease=LEASE)
        try:
            for number in range(4):
                queue.put(b"%d" % number, key=b"k%d" % (number % 2))
            code = (
                "import millstream, os, signal, sys\n"
                "queue = millstream.open(sys.argv[1]).queue(sys.argv[2], create=False)\n"
                "assert queue.get(timeout=15).value == b'0'\n"
                "os.kill(os.getpid(), signal.SIGKILL)\n"
            )
            command = [sys.executable, "-c", code, self.address_of(store), name]
            assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
            assert queue.get(timeout=0).value == b"1"  # of the other key; both 0 and 2 wait
            again = queue.get(timeout=WAIT)
            assert (again.value, queue.get_many(1, timeout=0)) == (b"0", [])
            again.ack()
            assert queue.get(timeout=WAIT).value == b"2"
        finally:
            store.drop_queue(name)

    @needs("queue.lease")
    def test_a_server_that_is_killed_keeps_what_it_answered(
        self, request: pytest.FixtureRequest, store: Any, name: str
    ) -> None:
        """A server that is killed keeps what it answered."""
        queue = self.queue(store, name, lease=LEASE)
        try:
            queue.put_many([b"a", b"b", b"done"][::-1])
            queue.get(timeout=WAIT).ack()
            queue.get(timeout=WAIT)  # its holder never comes back to it
            self.restart(request)
            self.in_time(lambda: queue.put(b"c"))
            self.found(queue, {b"a", b"b", b"c"})
        finally:
            self.in_time(lambda: store.drop_queue(name))

    @needs("queue.lease")
    def test_a_connection_that_is_cut_or_slow_loses_nothing(self, store: Any, name: str) -> None:
        """A connection that is cut or slow loses nothing."""
        found = re.search(r"//(?:[^@/]*@)?([^:/]+):([0-9]+)", self.address_of(store))
        if found is None:  # a directory has no connection
            return
        self.queue(store, name, lease=5 * LEASE)
        proxy = Proxy(found[1], int(found[2]))
        try:
            with proxy, millstream.open(proxy.through(self.address_of(store))) as far:
                queue = far.queue(name, create=False)
                queue.put(b"a")
                held = queue.get(timeout=WAIT)
                proxy.cut()
                self.in_time(lambda: queue.put(b"b"))
                with contextlib.suppress(millstream.StorageError, millstream.LeaseLost):
                    held.ack()
                proxy.delay = 0.05
                self.in_time(lambda: queue.put(b"c"))
                self.found(queue, {b"b", b"c"}, {b"a"})
        finally:
            store.drop_queue(name)

    def in_time(self, call: Callable[[], object]) -> None:
        """Call until it does not raise StorageError any more."""
        end = time.monotonic() + 2 * WAIT
        while True:
            try:
                call()
                return
            except millstream.StorageError:
                assert time.monotonic() < end
                time.sleep(0.05)

    def found(self, queue: Any, values: set[bytes], perhaps: Collection[bytes] = ()) -> None:
        """Take messages until all values came; none but these and `perhaps` others came."""
        left = set(values)
        end = time.monotonic() + 2 * WAIT
        while left:
            assert time.monotonic() < end, left
            with contextlib.suppress(
                millstream.StorageError, millstream.LeaseLost, millstream.Empty
            ):
                with queue.get(timeout=1.0) as message:
                    assert message.value in values or message.value in perhaps
                left.discard(message.value)

    @needs("queue.peek", "queue.cancel", "queue.depth", "queue.purge")
    def test_what_waits_can_be_seen_and_removed(self, store: Any, name: str) -> None:
        """What waits can be seen and removed."""
        queue = self.queue(store, name)
        try:
            first, second, _ = [queue.put(value) for value in (b"a", b"b", b"c")]
            assert [one.value for one in queue.peek(2)] == [b"a", b"b"]
            assert (len(queue), queue.stats().ready) == (3, 3)
            assert queue.cancel(second) is True
            assert queue.cancel(second) is False
            message = queue.get(timeout=WAIT)
            assert message.id == first
            assert (queue.stats().ready, queue.stats().leased) == (1, 1)
            assert queue.purge() == 1
            message.ack()
            assert len(queue) == 0
        finally:
            store.drop_queue(name)

    @needs("queue.ttl")
    def test_what_is_too_old_is_not_delivered(self, store: Any, name: str) -> None:
        """What is too old is not delivered."""
        queue = self.queue(store, name)
        try:
            queue.put(b"old", ttl=1.0)
            queue.put(b"stays")
            time.sleep(2.5)  # it ends
            assert [one.value for one in self.taken(queue, 1)] == [b"stays"]
            with pytest.raises(millstream.Empty):
                queue.get(timeout=0.2)
        finally:
            store.drop_queue(name)
