"""The cases of every engine, over a real Kafka; and what is Kafka's own."""

import struct
import subprocess
import sys

import pytest
from nats_server import free_port
from test_nats import listening, refused

import millstream
from millstream.engines.kafka.records import Row
from millstream.testing.conformance import QueueCases, StreamCases

pytestmark = pytest.mark.usefixtures("kafka_server")


@pytest.fixture(scope="session")
def address(kafka_server):
    return kafka_server.address


class TestStreams(StreamCases):
    pass


class TestQueues(QueueCases):
    pass


@pytest.fixture
def store(address):
    with millstream.open(address) as made:
        yield made
        for name in made.streams():
            made.drop_stream(name)


def values(stream, **how):
    return [value for batch in stream.read(**how) for value in batch.values]


# --- what only Kafka has --------------------------------------------------------------------------


def test_durability_means_what_it_says(store, address):
    stream = store.stream("buffered")
    for call in (
        lambda: stream.append(b"x", durability="sync"),
        lambda: store.stream("buffered", durability="sync"),
    ):
        with pytest.raises(millstream.Unsupported, match=r"flush\.messages=1") as caught:
            call()
        assert caught.value.capability == "durability.sync"
    assert stream.next_offset(0) == 0
    with millstream.open(address, durability="sync") as synced:
        durable = synced.stream("durable")
        assert durable.append(b"x").offset == 0
    assert store.config_of("durable")["flush.messages"] == "1"
    with pytest.raises(millstream.Unsupported, match="does not sync that a transaction"):
        store.stream("durable").producer("p").append_many(
            [b"x"], first_sequence=0, durability="sync"
        )


def test_a_transaction_has_a_bound(store):
    stream = store.stream("two")
    with pytest.raises(millstream.LimitExceeded), store.transaction(max_bytes=100) as tx:
        tx.append(stream, b"x" * 100)
    assert values(stream) == []


def test_marks_of_transactions_are_no_lag(store):
    stream = store.stream("marked")
    with store.transaction() as tx:
        tx.append_many(stream, [b"a", b"b"])
    client = store.transacting()
    client.begin_transaction()
    client.produce("marked", b"never", partition=0)
    client.flush()
    client.abort_transaction()
    with stream.consumer("g") as consumer:
        batch = consumer.poll(15)
        assert list(batch.values) == [b"a", b"b"]
        consumer.commit(batch)
        assert consumer.lag() == 0
    assert stream.group("g").lag() == 0
    assert stream.next_offset(0) == 5  # two records, a mark, one that was given up, its mark
    assert values(stream) == [b"a", b"b"]


def test_who_sends_as_a_producer_last_fences_the_others_and_nothing_is_doubled(store):
    stream = store.stream("twice")
    one, other = stream.producer("p"), stream.producer("p")
    one.append_many([b"0", b"1"], first_sequence=0)
    assert other.append_many([b"1", b"2"], first_sequence=1)[0].count == 1
    assert one.append_many([b"2", b"3"], first_sequence=2)[0].count == 1  # behind the other's
    assert values(stream) == [b"0", b"1", b"2", b"3"]
    assert stream.add_partitions(2) == 3
    assert one.append_many([b"x"], sequences=[0], partition=2)
    assert stream.producer("p").last_sequences == (3, -1, 0)


def test_settings_of_topics(store):
    store.make_topic("foreign", 2, {})
    assert store.stream("foreign").partitions == 2
    assert store.stream("foreign").retention == millstream.Retention(age="7d")
    with pytest.raises(millstream.ConfigMismatch, match="partitions 2, not 3"):
        store.stream("foreign", partitions=3)
    with pytest.raises(millstream.ConfigMismatch, match="retention.ms=604800000, not 60000"):
        store.stream("foreign", retention=millstream.Retention(age=60))
    short = millstream.Retention(age=60, bytes=1000)
    assert store.stream("foreign", retention=short, on_mismatch="alter").retention == short
    with pytest.raises(millstream.Unsupported, match="counts no records"):
        store.stream("counted", retention=millstream.Retention(records=1))
    compacted = store.stream("compacted", compact=millstream.Compaction(min_age=1))
    assert compacted.config["cleanup.policy"] == "compact"
    with pytest.raises(millstream.NotFound):
        store.stream("none", create=False)
    assert store.streams() == ["compacted", "foreign"]
    assert store.stats().streams[0].name == "compacted"


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
    code, shown, said = millstream_of("info", address)
    assert code == 0, said
    assert "orders" in shown
    code, _, said = millstream_of("queue", "ls", address)
    assert code == 0, said


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "a b", "", "..", "ä", "__own", "x" * 201])
def test_a_name_that_the_engine_does_not_take(store, name):
    with pytest.raises(millstream.InvalidArgument, match="takes 1 to 200 characters"):
        store.stream(name)


def test_a_record_is_as_large_as_the_topic_takes(store):
    store.make_topic("small", 1, {"max.message.bytes": "2000"})
    stream = store.stream("small")
    fits = next(n for n in range(2000) if Row(b"x" * (n + 1), b"k", 0, [("h", b"1")]).size > 2000)
    how = {"keys": [b"k"], "headers": {"h": b"1"}}
    stream.append_many([b"x" * fits], **how)
    with pytest.raises(millstream.LimitExceeded, match=r"raise max\.message\.bytes"):
        stream.append_many([b"x" * (fits + 1)], **how)
    stream.append_many([b"y" * 100] * 500)  # more than a batch takes
    assert stream.next_offset(0) == 501


def test_no_server():
    refused(f"kafka://127.0.0.1:{free_port()}", "is the server running")
    refused("kafka://no-such-host.invalid:9092", "is the server running")


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n", b"\0" * 64])
def test_a_server_of_another_protocol(says):
    with listening(says) as port:
        refused(f"kafka://127.0.0.1:{port}", "Kafka", timeout=1)


def test_a_server_that_says_nothing():
    with listening(b"") as port:
        refused(f"kafka://127.0.0.1:{port}", "no answer within 1 s", timeout=1)


def answer_of(features):
    """What a broker answers to ApiVersions of version 3."""
    tags = b"\0"
    if features:
        level = b"\x02\x11metadata.version" + struct.pack(">hh", features, features) + b"\0"
        tags = b"\x01\x02" + bytes([len(level)]) + level
    body = struct.pack(">ih", 1, 0) + b"\x02" + struct.pack(">hhh", 18, 0, 4) + b"\0"
    body += struct.pack(">i", 0) + tags
    return struct.pack(">i", len(body)) + body


OLD_FORMAT = struct.pack(">iih", 6, 1, 35)


@pytest.mark.parametrize("says", [OLD_FORMAT, answer_of(0), answer_of(21)])
def test_a_server_that_is_too_old(says):
    with listening(says, answer=b" ") as port:
        refused(f"kafka://127.0.0.1:{port}", "is too old", millstream.Unsupported)


def test_users(kafka_server):
    host = f"127.0.0.1:{kafka_server.ports['USERS']}"
    refused(f"kafka://{host}", "does it want a user")
    refused(f"kafka://ann:secret2@{host}", "are user, password and mechanism")
    refused(f"kafka://ann:secret@{host}?sasl=SCRAM-SHA-512", "mechanism")
    refused(f"kafka://ann:secret@{kafka_server.address[8:]}", "user")
    for more in ("", "?sasl=SCRAM-SHA-256"):
        with millstream.open(f"kafka://ann:secret@{host}{more}") as store:
            assert store.stream("s").append(b"x").partition == 0
            assert "secret" not in repr(store)


def test_tls_with_an_authority_of_ones_own(kafka_server, store):
    host = f"kafka://127.0.0.1:{kafka_server.ports['TLS']}"
    authority = f"{kafka_server.certificates}/ca.pem"
    refused(host, "TLS", timeout=1)
    refused(f"{host}?tls=yes", "tls_ca=FILE")
    with millstream.open(f"{host}?tls_ca={authority}") as secure:
        assert secure.stream("secure").append(b"x").offset == 0
    refused(f"{host}?tls_ca={authority}x", "TLS files cannot be used")
    refused(f"kafka://127.0.0.1:{kafka_server.port}?tls_ca={authority}", "TLS", timeout=2)


@pytest.mark.parametrize(
    "wrong",
    ["kafka://h/path", "kafka://", "kafka://h:99999", "kafka://h?x=1", "kafka://ann@h",
     "kafka://h,", "kafka://ann:x@h?sasl=GSSAPI"],
)  # fmt: skip
def test_an_address_that_says_nothing(wrong):
    with pytest.raises(millstream.InvalidArgument):
        millstream.open(wrong)
