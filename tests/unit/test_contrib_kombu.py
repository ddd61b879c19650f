"""The transport for kombu: what a virtual broker must do, and what ours does beyond it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

kombu = pytest.importorskip("kombu")

from contrib_steps import install  # noqa: E402
from kombu.asynchronous.hub import Hub  # noqa: E402
from timing import SOON, until  # noqa: E402

import millstream  # noqa: E402
from millstream.contrib.kombu import _stored_name, path_of  # noqa: E402
from millstream.contrib.sharing import lane_of  # noqa: E402
from millstream.testing import clock  # noqa: E402


@pytest.fixture
def url(tmp_path):
    return f"millstream://{tmp_path}/store"


@pytest.fixture
def connection(url):
    with kombu.Connection(url) as opened:
        yield opened


@pytest.fixture
def wrong(tmp_path):
    (tmp_path / "file").write_text("no directory")
    return kombu.Connection(f"millstream://{tmp_path}/file/store")


def publish(channel, body, queue, **options):
    kombu.Producer(channel).publish(
        body,
        exchange=queue.exchange or "",
        routing_key=queue.routing_key or queue.name,
        declare=[queue],
        **options,
    )


class Inbox:
    """A consumer that notes what it gets."""

    def __init__(self, connection, queue, ack=True, **options):
        self.bodies, self.messages, self._ack = [], [], ack
        self._connection = connection
        self.consumer = kombu.Consumer(connection, [queue], callbacks=[self._note], **options)

    def _note(self, body, message):
        self.bodies.append(body)
        self.messages.append(message)
        if self._ack:
            message.ack()

    def drain(self, timeout=SOON):
        """All that there is; where there is nothing, what comes first. Each call gives one."""
        with self.consumer:
            self._connection.drain_events(timeout=timeout)
            with contextlib.suppress(socket.timeout):
                while True:
                    self._connection.drain_events(timeout=0)
        return self.bodies

    def finds_nothing(self):
        with pytest.raises(socket.timeout):
            self.drain(timeout=0.05)


# --- connecting -----------------------------------------------------------------------------------


def test_connecting_again_after_a_close(connection):
    for _ in range(2):
        assert connection.connect()
        assert connection.connection
        connection.close()
        assert connection.connection is None
    assert connection.default_channel
    assert connection.channel()


@pytest.mark.parametrize("how", ["connect", "connection", "channel", "default_channel"])
def test_a_place_where_no_store_can_be_is_said_at_once(wrong, how):
    wrong.transport_options = {"max_retries": 1}
    with pytest.raises(millstream.StorageError, match="is not a directory"):
        found = getattr(wrong, how)
        found()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("millstream://data/app", "three slashes"),
        ("millstream:///", "names no directory"),
        ("millstream:///a?durability=sync", r"neither \? nor #"),
    ],
)
def test_an_address_that_names_no_directory_is_refused(url, said):
    with pytest.raises(millstream.InvalidArgument, match=said):
        kombu.Connection(url).connect()


def test_an_address_names_a_path():
    assert path_of("millstream:///a/b%20c") == "/a/b c"
    assert path_of("millstream://localhost/a") == "/a"


def test_a_queue_that_others_made_with_other_settings_is_refused(connection, tmp_path):
    with millstream.open(tmp_path / "store") as store:
        store.queue("tasks", priorities=4)
    with pytest.raises(millstream.ConfigMismatch, match="priorities"):
        connection.SimpleQueue("tasks")


def test_autoretry_gives_the_default_channel(connection):
    calls = []

    def operation(value, channel):
        calls.append(channel)
        return value

    result, channel = connection.autoretry(operation, max_retries=0)("result")
    assert (result, calls) == ("result", [channel])
    assert channel is connection.default_channel


def test_closing_the_last_connection_closes_the_store(url):
    one, two = kombu.Connection(url), kombu.Connection(url)
    store = one.connect().broker.store
    two.connect()
    one.release()
    assert not store.closed
    two.release()
    assert store.closed


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml"])
def test_what_is_published_is_consumed(connection, serializer):
    if serializer == "yaml":
        pytest.importorskip("yaml")
    queue = kombu.Queue("test", routing_key="test")
    publish(connection.channel(), {"hello": "world"}, queue, serializer=serializer, retry=True)
    inbox = Inbox(connection, queue, accept=[serializer])
    assert inbox.drain() == [{"hello": "world"}]
    assert inbox.messages[0].payload == {"hello": "world"}
    assert inbox.messages[0].delivery_info["routing_key"] == "test"
    inbox.finds_nothing()


@pytest.mark.parametrize("kind", ["SimpleQueue", "SimpleBuffer"])
def test_a_simple_queue_gives_payload_and_headers(connection, kind):
    with closing(getattr(connection, kind)("simple")) as queue:
        queue.put({"Hello": "World"}, headers={"k1": "v1"})
        message = queue.get(timeout=SOON)
        assert message.payload == {"Hello": "World"}
        assert message.content_type == "application/json"
        assert message.content_encoding == "utf-8"
        assert message.headers == {"k1": "v1"}
        message.ack()


def test_a_body_of_any_bytes_and_compression(connection):
    with closing(connection.SimpleQueue("bytes")) as queue:
        body = bytes(range(256)) + b"\n\n"
        queue.put(body, serializer="raw")
        assert queue.get(timeout=SOON).body == body
        queue.put({"a": "b" * 1000}, compression="zlib")
        assert queue.get(timeout=SOON).payload == {"a": "b" * 1000}


def test_an_empty_queue_times_out(connection):
    Inbox(connection, kombu.Queue("empty", routing_key="empty")).finds_nothing()


def test_ack_reject_and_requeue(connection):
    with closing(connection.SimpleQueue("acks")) as queue:
        queue.put(1)
        queue.get_nowait().ack()
        with pytest.raises(queue.Empty):
            queue.get_nowait()
        queue.put(2)
        queue.get_nowait().reject(requeue=True)
        queue.get_nowait().requeue()
        queue.get_nowait().reject(requeue=False)
        with pytest.raises(queue.Empty):
            queue.get_nowait()
        letters = connection.default_channel.queue("acks").dead.list()
        assert [letter.last_error for letter in letters] == ["rejected by its consumer"]


def test_what_is_not_acknowledged_comes_back_when_the_channel_closes(connection):
    channel = connection.channel()
    queue = kombu.Queue("back", routing_key="back")
    publish(channel, 1, queue)
    assert channel.basic_get("back") is not None
    channel.close()
    assert Inbox(connection, queue).drain() == [1]


def test_a_message_is_leased_until_it_is_acknowledged(connection):
    with clock() as virtual:
        queue = kombu.Queue("long", routing_key="long")
        publish(connection.channel(), 1, queue)
        message = connection.default_channel.basic_get("long")
        virtual.advance(29 * 86400)
        assert connection.channel().basic_get("long") is None
        message.ack()
        assert len(connection.default_channel.queue("long")) == 0


def options(**given):
    return given


def test_options_of_redis_are_pointed_out(url, caplog):
    given = options(visibility_timeout=1, priority_steps=[0], global_keyprefix="a-", capacity=9)
    with clock() as virtual, kombu.Connection(url, transport_options=given) as connection:
        queue = kombu.Queue("visible", routing_key="visible")
        publish(connection.channel(), 1, queue)
        message = connection.default_channel.basic_get("visible")
        virtual.advance(60)
        assert connection.channel().basic_get("visible") is None
        message.ack()
    unknown = "global_keyprefix, priority_steps, visibility_timeout"
    assert f"{unknown}: no option of millstream" in caplog.text


@pytest.mark.parametrize("value", ["soon", None, -1, float("nan")])
def test_a_wrong_time_out_is_named(url, value):
    with (
        kombu.Connection(url, transport_options={"put_timeout": value}) as connection,
        pytest.raises(millstream.InvalidArgument, match="put_timeout="),
    ):
        connection.channel()


def test_without_acknowledgement_nothing_is_held(connection):
    queue = kombu.Queue("noack", routing_key="noack")
    for body in range(3):
        publish(connection.channel(), body, queue)
    assert Inbox(connection, queue, ack=False, no_ack=True).drain() == [0, 1, 2]
    assert len(connection.default_channel.queue("noack")) == 0


def test_prefetch_bounds_what_is_held(connection):
    queue = kombu.Queue("few", routing_key="few")
    for body in range(5):
        publish(connection.channel(), body, queue)
    inbox = Inbox(connection, queue, ack=False, prefetch_count=2)
    with inbox.consumer:
        for _ in range(2):
            connection.drain_events(timeout=SOON)
        assert inbox.bodies == [0, 1]
        with pytest.raises(socket.timeout):
            connection.drain_events(timeout=0.05)
        # What it has no room for is there for others.
        assert connection.channel().basic_get("few", no_ack=True).payload == 2
        inbox.messages[0].ack()
        connection.drain_events(timeout=SOON)
        assert inbox.bodies == [0, 1, 3]


def test_a_waiting_consumer_is_woken(connection):
    queue = kombu.Queue("woken", routing_key="woken")
    inbox = Inbox(connection, queue)
    with inbox.consumer:
        with pytest.raises(socket.timeout):
            connection.drain_events(timeout=0)
        with kombu.Connection(connection.hostname) as other:
            threading.Timer(0.05, publish, (other.channel(), 1, queue)).start()
            connection.drain_events(timeout=SOON)
            assert inbox.bodies == [1]
            until(lambda: threading.active_count() < 20)


def test_a_full_queue_says_so(url):
    options = {"capacity": 2, "put_timeout": 0.01}
    with kombu.Connection(url, transport_options=options) as connection:
        queue = kombu.Queue("full", routing_key="full")
        publish(connection, 1, queue)
        publish(connection, 2, queue)
        with pytest.raises(millstream.QueueFull):
            publish(connection, 3, queue)


# --- time to live, priorities ---------------------------------------------------------------------


def test_an_expired_message_is_not_delivered(connection):
    with clock() as virtual:
        queue = kombu.Queue("ttl", routing_key="ttl")
        publish(connection.channel(), 1, queue, expiration=2)
        with closing(connection.SimpleQueue("ttl_simple")) as simple:
            simple.put(1, expiration=2)
            virtual.advance(3)
            with pytest.raises(simple.Empty):
                simple.get(timeout=0.05)
        Inbox(connection, queue).finds_nothing()


def test_a_queue_with_a_message_ttl(connection):
    with clock() as virtual:
        queue = kombu.Queue("ttls", routing_key="ttls", message_ttl=2.0)
        publish(connection.channel(), 1, queue)
        virtual.advance(3)
        Inbox(connection, queue).finds_nothing()


def test_the_higher_priority_comes_first(connection):
    queue = kombu.Queue("priority", routing_key="priority", max_priority=10)
    for body, priority in [("first", 3), ("second", 6), ("third", 3)]:
        publish(connection.channel(), body, queue, priority=priority)
    inbox = Inbox(connection, queue, ack=False)
    assert inbox.drain() == ["second", "first", "third"]
    for message in inbox.messages:
        message.requeue()
    inbox.bodies.clear()
    publish(connection.channel(), "fourth", queue, priority=9)
    assert inbox.drain() == ["fourth", "second", "first", "third"]


@pytest.mark.parametrize("kind", ["SimpleQueue", "SimpleBuffer"])
def test_priorities_of_a_simple_queue(connection, kind):
    with closing(getattr(connection, kind)("simple", queue_opts={"max_priority": 10})) as queue:
        for body, priority in [("first", 1), ("second", 7), ("third", 1)]:
            queue.put(body, priority=priority)
        found = []
        for _ in range(3):
            message = queue.get(timeout=SOON)
            message.ack()
            found.append(message.payload)
        assert found == ["second", "first", "third"]


def test_ten_priorities_in_eight_lanes():
    assert [lane_of(priority) for priority in range(10)] == [7, 6, 5, 4, 3, 3, 2, 1, 0, 0]


def test_a_task_with_an_eta_is_delayed_in_the_store(connection):
    from datetime import UTC, datetime, timedelta

    with clock() as virtual:
        eta = datetime.now(UTC) + timedelta(hours=30)
        queue = kombu.Queue("eta", routing_key="eta")
        headers = {"task": "app.add", "eta": eta.isoformat()}
        publish(connection.channel(), 1, queue, headers=headers)
        stored = connection.default_channel.queue("eta")
        assert (stored.stats().delayed, stored.stats().ready) == (1, 0)
        virtual.advance(29 * 3600)
        Inbox(connection, queue).finds_nothing()
        virtual.advance(2 * 3600)
        assert Inbox(connection, queue).drain() == [1]


# --- exchanges ------------------------------------------------------------------------------------


def test_direct_by_routing_key(connection):
    exchange = kombu.Exchange("direct", type="direct")
    one = kombu.Queue("d1", exchange=exchange, routing_key="1")
    two = kombu.Queue("d2", exchange=exchange, routing_key="2")
    producer = kombu.Producer(connection.channel(), exchange=exchange)
    producer.publish("x", routing_key="1", declare=[one, two])
    Inbox(connection, two).finds_nothing()
    assert Inbox(connection, one).drain() == ["x"]
    producer.publish("y", routing_key="3")
    Inbox(connection, one).finds_nothing()
    Inbox(connection, two).finds_nothing()


def test_fanout_to_all(connection):
    exchange = kombu.Exchange("fan", type="fanout")
    queues = [kombu.Queue(f"f{number}", exchange=exchange) for number in range(2)]
    kombu.Producer(connection.channel(), exchange=exchange).publish("x", declare=[*queues])
    assert [Inbox(connection, queue).drain() for queue in queues] == [["x"], ["x"]]


def test_topic_by_pattern(connection):
    exchange = kombu.Exchange("topics", type="topic")
    keys = {"t.*": True, "t.#": True, "*.1": True, "t": False, "t.2": False}
    queues = {
        key: kombu.Queue(f"t{number}", exchange=exchange, routing_key=key)
        for number, key in enumerate(keys)
    }
    producer = kombu.Producer(connection.channel(), exchange=exchange)
    producer.publish("x", routing_key="t.1", declare=list(queues.values()))
    for key, comes in keys.items():
        assert connection.default_channel.queue(queues[key].name).stats().ready == comes, key


def test_publishing_to_an_exchange_with_nothing_bound(connection):
    exchange = kombu.Exchange("nothing", type="topic")
    kombu.Producer(connection.channel(), exchange=exchange).publish("x", routing_key="t.1")
    assert connection.default_channel.get_table("nothing") == []


@pytest.mark.parametrize("type", ["headers", "x-delayed-message"])
def test_other_types_of_exchange_are_refused(connection, type):
    with pytest.raises(kombu.exceptions.ChannelError, match="direct, topic and fanout"):
        kombu.Exchange("other", type=type)(connection.channel()).declare()
    assert not connection.supports_exchange_type(type)


def test_an_exchange_keeps_its_type_for_all(connection):
    kombu.Exchange("typed", type="topic")(connection.channel()).declare()
    with kombu.Connection(connection.hostname) as other:
        with pytest.raises(Exception, match="is of type 'topic', not 'direct'"):
            kombu.Exchange("typed", type="direct")(other.channel()).declare()
        kombu.Exchange("typed", type="topic", passive=True)(other.channel()).declare()


@pytest.mark.parametrize(
    "arguments", [{"x-max-length": 10}, {"x-dead-letter-exchange": "d"}, {"x-queue-type": "quorum"}]
)
def test_arguments_that_cannot_be_had_are_refused(connection, arguments):
    queue = kombu.Queue("arguments", queue_arguments=arguments)
    with pytest.raises(kombu.exceptions.ChannelError, match="cannot be had"):
        queue(connection.channel()).declare()


def test_bindings_are_known_to_other_processes_and_can_be_ended(connection):
    exchange = kombu.Exchange("shared", type="direct")
    queue = kombu.Queue("bound", exchange=exchange, routing_key="k")(connection.channel())
    queue.declare()
    code = (
        "import sys, kombu, millstream.contrib.kombu\n"
        "with kombu.Connection(sys.argv[1]) as c:\n"
        "    kombu.Producer(c).publish('x', exchange='shared', routing_key='k')\n"
        "    print(sorted(c.default_channel.list_bindings()))\n"
    )
    command = [sys.executable, "-c", code, connection.hostname]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "('bound', 'shared', 'k')" in ran.stdout
    assert queue.get().payload == "x"
    queue.unbind_from(exchange, routing_key="k")
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert queue.get() is None
    queue.purge()
    queue.delete()
    assert "bound" not in connection.default_channel.broker.store.queues()


# --- queues that come and go ----------------------------------------------------------------------


def test_a_queue_of_a_consumer_that_left_is_removed(connection):
    exchange = kombu.Exchange("news", type="fanout")
    queue = kombu.Queue("reader@1", exchange=exchange, auto_delete=True)
    inbox = Inbox(connection, queue)
    with inbox.consumer:
        kombu.Producer(connection.channel(), exchange=exchange).publish("x")
        connection.drain_events(timeout=SOON)
        assert inbox.bodies == ["x"]
        assert _stored_name("reader@1") in connection.default_channel.broker.store.queues()
    assert _stored_name("reader@1") not in connection.default_channel.broker.store.queues()
    assert connection.default_channel.get_table("news") == []


def test_a_queue_of_a_consumer_that_was_killed_is_removed(connection, monkeypatch):
    monkeypatch.setattr("millstream.contrib.kombu.LOOK_SECONDS", 0.0)
    exchange = kombu.Exchange("news", type="fanout")
    code = (
        "import sys, kombu, millstream.contrib.kombu, signal\n"
        "c = kombu.Connection(sys.argv[1])\n"
        "e = kombu.Exchange('news', type='fanout')\n"
        "q = kombu.Queue('dead', exchange=e, auto_delete=True, expires=0.1)\n"
        "kombu.Consumer(c, [q], callbacks=[print]).consume()\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", code, connection.hostname]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        producer = kombu.Producer(connection.channel(), exchange=exchange)
        for _ in range(3):
            producer.publish("x")  # looks each time, and it is used
        assert "dead" in connection.default_channel.broker.store.queues()
        child.send_signal(signal.SIGKILL)
    store = connection.default_channel.broker.store

    def gone():
        producer.publish("y")
        return "dead" not in store.queues()

    until(gone, "removing the queue")
    assert connection.default_channel.get_table("news") == []


def test_a_queue_that_was_dropped_and_made_again_is_another_one(connection):
    queue = kombu.Queue("again", routing_key="again")
    publish(connection.channel(), 1, queue)
    with millstream.open(connection.default_channel.broker.path) as other:
        other.drop_queue("again")
    publish(connection.channel(), 2, queue)
    assert Inbox(connection, queue).drain() == [2]


def test_what_comes_too_late_for_a_reader_makes_no_queue(connection, monkeypatch):
    exchange = kombu.Exchange("replies", type="direct")
    queue = kombu.Queue("reply", exchange=exchange, routing_key="r", auto_delete=True)
    queue(connection.channel()).declare()
    channel = connection.channel()
    producer = kombu.Producer(channel, exchange=exchange)
    producer.publish("x", routing_key="r")
    with kombu.Connection(connection.hostname) as other:
        found = channel._lookup

        def late(*arguments):
            queues = found(*arguments)
            other.default_channel.queue_delete("reply")
            return queues

        monkeypatch.setattr(channel, "_lookup", late)
        producer.publish("y", routing_key="r")
    assert "reply" not in channel.broker.store.queues()


def test_what_others_put_into_a_queue_of_kombu_is_a_dead_letter(connection, caplog):
    queue = kombu.Queue("mixed", routing_key="mixed")
    queue(connection.channel()).declare()
    stored = connection.default_channel.queue("mixed")
    stored.put_many([b"ann@example.org", b"[]\n", b"{}\n"])
    assert connection.default_channel.basic_get("mixed") is None
    publish(connection.channel(), 1, queue)
    assert Inbox(connection, queue).drain() == [1]
    assert stored.stats().dead == 3
    assert "kombu did not put it" in caplog.text


def test_a_slow_reader_of_news_stops_nobody(connection, caplog):
    channel = connection.channel()
    exchange = kombu.Exchange("news", type="fanout")
    queue = kombu.Queue("slow", exchange=exchange, auto_delete=True)(channel)
    queue.declare()
    channel.queue("slow").put_many([b"{}\n"] * 10_000)
    began = time.monotonic()
    kombu.Producer(channel, exchange=exchange).publish("x")
    assert time.monotonic() - began < SOON
    assert "its reader too slow: 1 lost" in caplog.text
    inbox = Inbox(connection, kombu.Queue("slow", exchange=exchange, auto_delete=True))
    with inbox.consumer:  # begins anew
        kombu.Producer(channel, exchange=exchange).publish("y")
        connection.drain_events(timeout=SOON)
    assert inbox.bodies == ["y"]


def test_names_of_queues_in_the_store():
    plain = ["celery", "my_queue", "a.b-c", "UPPER"]
    assert [_stored_name(name) for name in plain] == plain
    odd = ["celery@h.pidbox", "a__b", "_@", "__40", ".x", "x y", "é", "a_", "_" * 3]
    assert len({_stored_name(name) for name in [*plain, *odd]}) == len(plain) + len(odd)
    with pytest.raises(millstream.InvalidArgument, match="1 to 128"):
        _stored_name("@" * 100)


# --- event loops, forks, deaths -------------------------------------------------------------------


def test_acknowledging_from_another_thread_in_an_event_loop(connection):
    queue = kombu.Queue("loop", routing_key="loop")
    acked, hub = [], Hub()

    def ack(message):
        message.ack()
        acked.append(message.payload)

    def callback(body, message):
        threading.Timer(0.05, hub.call_soon, (ack, message)).start()

    for body in range(3):
        publish(connection.channel(), body, queue)
    consumer = kombu.Consumer(connection, [queue], callbacks=[callback], prefetch_count=1)
    with consumer:
        try:
            connection.register_with_event_loop(hub)
            deadline = time.monotonic() + SOON
            while len(acked) < 3 and time.monotonic() < deadline:
                hub.run_once()
            assert acked == [0, 1, 2]
        finally:
            connection.transport.unregister_from_event_loop(connection.connection, hub)
            hub.close()


def test_a_forked_child_publishes_with_the_connection_of_its_parent(connection):
    queue = kombu.Queue("forked", routing_key="forked")
    publish(connection, "parent", queue)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            publish(connection, "child", queue)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(Inbox(connection, queue).drain()) == ["child", "parent"]


def test_what_a_killed_consumer_held_comes_back(connection):
    queue = kombu.Queue("killed", routing_key="killed")
    publish(connection, "x", queue)
    code = (
        "import sys, kombu, millstream.contrib.kombu, signal\n"
        "c = kombu.Connection(sys.argv[1])\n"
        "m = c.default_channel.basic_get('killed')\n"
        "print(m.payload, flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", code, connection.hostname]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "x\n"
        assert connection.default_channel.basic_get("killed") is None
        child.send_signal(signal.SIGKILL)
    inbox = Inbox(connection, queue)
    assert inbox.drain() == ["x"]
    assert inbox.messages[0].delivery_info["redelivered"]


ALIAS = """
import sys, kombu.messaging
assert "millstream.contrib.kombu" not in sys.modules
with kombu.Connection(sys.argv[1]) as c:
    print(c.transport.driver_type)
"""


def test_the_alias_comes_with_the_installation(url, tmp_path):
    """kombu loads the entry point with `kombu.messaging`."""
    command = [sys.executable, "-c", ALIAS, url]
    environment = {**os.environ, "PYTHONPATH": install(tmp_path / "installed")}
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert ran.stdout == "millstream\n"


VERSION = """
import importlib.metadata, sys
def version(name):
    if sys.argv[2] == "none":
        raise importlib.metadata.PackageNotFoundError(name)
    return sys.argv[2]
importlib.metadata.version = version
__import__(sys.argv[1])
"""


@pytest.mark.parametrize("name", ["kombu", "celery"])
@pytest.mark.parametrize("version", ["none", "5.4.9", "6.0.0"])
def test_a_framework_that_is_missing_or_too_old_or_too_new_is_said(name, version):
    command = [sys.executable, "-c", VERSION, f"millstream.contrib.{name}", version]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = ran.stderr.splitlines()[-1]
    assert f"{name} 5.5 or later, before 6 is needed" in said
    assert f"pip install 'millstream[{name}]'" in said
