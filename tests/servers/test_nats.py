"""The cases of every engine, over a real NATS server; and what is NATS' own."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest
from nats_server import NatsServer, free_port
from tls_certificates import make_certificates

import millstream
from millstream.testing.conformance import QueueCases, StreamCases

pytestmark = pytest.mark.usefixtures("nats_server")


class Counted:
    def sent(self, store):
        return store.native.stats["out_bytes"] + store.native.stats["out_msgs"]


class TestStreams(Counted, StreamCases):
    pass


class TestQueues(Counted, QueueCases):
    @pytest.fixture(autouse=True)
    def _where(self, address):
        self.place = address

    def address_of(self, store):
        return self.place

    def restart(self, request):
        server = request.getfixturevalue("nats_server")
        server.kill()
        server.start()


@pytest.fixture
def store(address):
    with millstream.open(address) as made:
        yield made
        for name in made.streams():
            made.drop_stream(name)
        for name in made.queues():
            made.drop_queue(name)


# --- what only NATS has ---------------------------------------------------------------------------


def test_a_directory_and_a_server_have_the_same_api(store, address):
    assert store.engine == "nats 2.15.1"
    store.require("stream.producer", "queue.delay", "stream.fenced_commit")
    with pytest.raises(millstream.Unsupported, match="sync_interval: always"):
        store.require("durability.sync")
    with pytest.raises(millstream.Unsupported, match="sync_interval"):
        millstream.open(address, durability="sync")
    with millstream.open(f"{address}?sync_interval=always", durability="sync") as synced:
        synced.require("durability.sync")
        assert synced.stream("durable").append(b"x").offset == 0
    assert "durable" in store.streams()


def test_a_batch_is_seen_whole_or_not_at_all(store):
    stream = store.stream("whole", partitions=2)
    stream.append_many([b"%d" % i for i in range(1000)], partition=1)
    seen = {stream.next_offset(1)}
    assert seen == {1000}
    [span] = stream.append_many([b"x"] * 2500, partition=0)
    assert (span.first_offset, span.count) == (0, 2500)
    [part] = stream.append_many([b"y"] * 3, partition=0)
    assert tuple(part) == (0, 1, 2500, 3)


def test_members_share_the_partitions_and_hand_them_over(store):
    stream = store.stream("shared", partitions=4)
    first = stream.consumer("g")
    assert first.assignment == [0, 1, 2, 3]
    second = stream.consumer("g")
    shares = wait_for(
        lambda: (first.poll(0), second.poll(0), first.assignment, second.assignment)[2:],
        lambda shares: len(shares[0]) == len(shares[1]) == 2,
    )
    assert sorted(shares[0] + shares[1]) == [0, 1, 2, 3]
    for partition in range(4):
        stream.append(b"%d" % partition, partition=partition)
    found = []
    for consumer in (first, second):
        while (batch := consumer.poll(0.2)) is not None:
            found += batch.values
        consumer.commit()
    assert sorted(found) == [b"0", b"1", b"2", b"3"]
    second.close()
    left = wait_for(lambda: (first.poll(0), first.assignment)[1], lambda have: len(have) == 4)
    assert left == [0, 1, 2, 3]
    assert first.lag() == 0
    first.close()


def wait_for(look, enough):
    """What is seen once it is enough; a minute at most."""
    end = time.monotonic() + 60
    while not enough(found := look()):
        assert time.monotonic() < end, found
    return found


def test_what_another_process_sends_as_the_same_producer_is_dropped(store):
    stream = store.stream("twice")
    one, other = stream.producer("p"), stream.producer("p")
    one.append_many([b"0", b"1"], first_sequence=0)
    assert other.append_many([b"1", b"2"], first_sequence=1)[0].count == 1
    assert one.append_many([b"2", b"3"], first_sequence=2)[0].count == 1  # behind the other's
    assert [v for batch in stream.read() for v in batch.values] == [b"0", b"1", b"2", b"3"]


def test_a_queue_has_a_capacity_or_delays(store):
    queue = store.queue("bounded", capacity=5)
    with pytest.raises(millstream.Unsupported, match="capacity"):
        queue.put(b"x", delay=1)
    assert len(queue) == 0


def test_a_late_acknowledgement_is_refused_by_our_clock(store):
    queue = store.queue("late", lease=0.5)
    queue.put(b"x")
    late = queue.get(timeout=10)
    again = queue.get(timeout=10)
    assert again.attempt == 2
    with pytest.raises(millstream.LeaseLost):
        late.ack()
    again.extend()
    again.ack()
    assert len(queue) == 0


def test_what_a_restart_of_the_server_leaves(tmp_path):
    with NatsServer(tmp_path / "nats") as server, millstream.open(server.address) as store:
        stream, queue = store.stream("s"), store.queue("q")
        stream.append_many([b"%d" % i for i in range(50)])
        queue.put(b"m")
        store.connection.timeout = 1.0
        server.kill()
        with pytest.raises(millstream.StorageError):
            stream.append(b"while it is away")
        server.start()
        wait_for(lambda: answers(stream), bool)
        assert [v for batch in stream.read() for v in batch.values][:50] == [
            b"%d" % i for i in range(50)
        ]
        queue.get(timeout=10).ack()


def answers(stream):
    try:
        return stream.next_offset(0) >= 50
    except millstream.StorageError:
        return False


def test_a_stream_that_somebody_else_made_is_refused(store):
    store.connection.do("STREAM.CREATE.foreign", {"name": "foreign", "subjects": ["foreign.0"]})
    try:
        with pytest.raises(millstream.ConfigMismatch, match="not made by millstream"):
            store.stream("foreign")
        assert "foreign" not in store.streams()
    finally:
        store.remove("foreign")


def test_another_setting_than_stored_is_refused(store):
    store.stream("set", partitions=2)
    assert store.stream("set").partitions == 2
    with pytest.raises(millstream.ConfigMismatch, match="partitions 2, not 3"):
        store.stream("set", partitions=3)
    assert store.stream("set", partitions=3, on_mismatch="keep").partitions == 2
    with pytest.raises(millstream.NotFound):
        store.stream("none", create=False)
    with pytest.raises(millstream.NotFound):
        store.queue("none", create=False)


def millstream_of(*words, given=b""):
    """What the command line prints."""
    command = [sys.executable, "-m", "millstream", *words]
    done = subprocess.run(command, input=given, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_command_line_takes_the_address(store, address):
    store.stream("orders")
    code, _, said = millstream_of("append", address, "orders", given=b"a\nb\n")
    assert code == 0, said
    assert millstream_of("cat", address, "orders")[1] == "a\nb\n"
    assert millstream_of("tail", address, "orders", "-n", "1")[1] == "b\n"
    shown = millstream_of("ls", address, "--json")[1]
    assert '"orders"' in shown
    store.queue("mail")
    assert millstream_of("queue", "put", address, "mail", "hello")[0] == 0
    assert "mail" in millstream_of("queue", "ls", address)[1]
    assert millstream_of("queue", "get", address, "mail")[1] == "hello\n"
    store.stream("orders").consumer("g").close()
    code, shown, said = millstream_of("info", address)
    assert code == 0, said
    assert "orders" in shown
    assert "mail" in shown
    assert store.stats().groups[0].lag == 2
    code, shown, said = millstream_of("groups", "ls", address, "orders", "--json")
    assert '"g"' in shown, said
    code, shown, said = millstream_of("groups", "lag", address, "orders", "g", "--json")
    assert "2" in shown, said


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "a b", "", "a>", "*", "ä", "x" * 129])
def test_a_name_that_the_engine_does_not_take(store, name):
    for call in (store.stream, store.queue):
        with pytest.raises(millstream.InvalidArgument, match="takes 1 to 128 characters"):
            call(name)


def test_a_record_that_is_larger_than_the_server_takes(store):
    stream, queue = store.stream("large"), store.queue("large")
    for call in (stream.append, queue.put, lambda value: stream.append_many([b"x", value])):
        with pytest.raises(millstream.LimitExceeded, match="raise max_payload"):
            call(b"x" * (1 << 20))
    assert (stream.next_offset(0), len(queue)) == (0, 0)


def refused(address, text, kind=millstream.StorageError, timeout=3):
    began = time.monotonic()
    with pytest.raises(kind, match=text) as caught:
        millstream.open(address, timeout=timeout)
    assert time.monotonic() - began < timeout + 5
    assert "secret" not in str(caught.value)


def test_no_server():
    refused(f"nats://127.0.0.1:{free_port()}", "is the server running")


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n"])
def test_a_server_of_another_protocol(says):
    with listening(says) as port:
        refused(f"nats://127.0.0.1:{port}", "NATS", timeout=1)


def test_a_server_that_is_too_old():
    info = b'INFO {"version":"2.9.25","max_payload":1048576,"headers":true,"jetstream":true}\r\n'
    with listening(info, answer=b"PONG\r\n") as port:
        refused(f"nats://127.0.0.1:{port}", "2.9.25 is too old", millstream.Unsupported)


def test_a_server_without_jetstream(tmp_path):
    with NatsServer(tmp_path / "nats", jetstream=False) as server:
        refused(server.address, "start it with -js", millstream.Unsupported)


def test_users(tmp_path):
    with NatsServer(tmp_path / "nats", "--user", "ann", "--pass", "secret") as server:
        host = server.address.removeprefix("nats://")
        for wrong in (f"nats://{host}", f"nats://ann:secret2@{host}"):
            refused(wrong, "name user and password")
        with millstream.open(f"nats://ann:secret@{host}") as store:
            assert store.stream("s").append(b"x").offset == 0
            assert "secret" not in repr(store)


def test_tls_with_an_authority_of_ones_own(tmp_path):
    make_certificates(tmp_path)
    options = ["--tls", "--tlscert", tmp_path / "server.pem", "--tlskey", tmp_path / "server.key"]
    with NatsServer(tmp_path / "nats", *options) as server:
        refused(server.address, "tls_ca=FILE", timeout=1)
        with millstream.open(f"{server.address}?tls_ca={tmp_path}/ca.pem") as store:
            assert store.stream("s").append(b"x").offset == 0
        refused(f"{server.address}?tls_ca={tmp_path}/none.pem", "TLS files cannot be used")


@pytest.mark.parametrize("wrong", ["nats://h/path", "nats://", "nats://h:99999", "nats://h?x=1"])
def test_an_address_that_says_nothing(wrong):
    with pytest.raises(millstream.InvalidArgument):
        millstream.open(wrong)


@contextlib.contextmanager
def listening(says, answer=b""):
    """A server that says something to whoever connects, and answers all it hears."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def serve():
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    client, _ = server.accept()
                    threading.Thread(target=talk, args=(client,), daemon=True).start()

        def talk(client):
            with client, contextlib.suppress(OSError):
                client.sendall(says)
                while heard := client.recv(4096):
                    if b"PING" in heard or not answer:
                        client.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        ended.set()
        socket.create_connection(server.getsockname()).close()
        thread.join()
