"""What a store tells Prometheus, read by prometheus_client's own parser."""

import subprocess
import sys
import time
import urllib.request

import pytest

import millstream
from millstream.cli import main
from millstream.testing import clock

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from millstream.contrib.prometheus import METRICS, Collector


def parsed(text):
    """Samples by name and labels, of a text that the parser takes and that has each once."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def scraped(store):
    registry = CollectorRegistry()
    registry.register(Collector(store))
    return parsed(generate_latest(registry).decode())


def filled(store):
    """Streams, groups and queues of which each figure is known."""
    events = store.stream("events", partitions=2)
    old = int((time.time() - 100) * 1e6)
    events.append_many([b"a", b"b", b"c"], partition=1, timestamps=[old, old + 40_000_000, old])
    with events.consumer("readers", max_records=1) as consumer:
        consumer.poll()
        consumer.commit()
    mail = store.queue("mail", capacity=10, priorities=2)
    mail.put_many([b"x", b"y", b"z"])
    mail.get(timeout=5).reject("no")
    mail.put(b"later", delay=3600)
    return mail.get(timeout=5)


def test_each_figure_is_what_the_store_has(store):
    leased = filled(store)
    found = scraped(store)

    def of(name, **labels):
        return found[name, *sorted(labels.items())]

    states = {"ready": 1, "delayed": 1, "held": 0, "leased": 1, "dead": 1}
    for state, count in states.items():
        assert of("millstream_queue_messages", queue="mail", state=state) == count
    assert of("millstream_queue_capacity", queue="mail") == 10
    for what, count in {"put": 4, "done": 0, "failed": 1, "expired": 0, "cancelled": 0}.items():
        assert of(f"millstream_queue_{what}_total", queue="mail") == count
    assert 0 <= of("millstream_queue_oldest_age_seconds", queue="mail") < 20
    assert of("millstream_members") == 1
    assert of("millstream_queue_paused", queue="mail") == 0
    one, none = ({"stream": "events", "partition": number} for number in "10")
    assert of("millstream_stream_records", **one) == 3
    assert of("millstream_stream_bytes", **one) > 3
    assert of("millstream_stream_allocated_bytes", **one) > 3
    assert 99 < of("millstream_stream_oldest_age_seconds", **one) < 120
    assert of("millstream_stream_records", **none) == 0
    assert of("millstream_stream_oldest_age_seconds", **none) == 0
    assert of("millstream_group_lag_records", group="readers", **one) == 2
    assert 59 < of("millstream_group_lag_seconds", group="readers", **one) < 80
    assert of("millstream_group_lag_seconds", group="readers", **none) == 0
    assert of("millstream_group_members", group="readers", stream="events") == 0
    assert of("millstream_health") == 1
    assert {key[0] for key in found} == set(METRICS)
    leased.release()


def test_messages_that_expired_are_counted():
    with clock() as now, millstream.temporary() as store:
        queue = store.queue("mail", ttl=1.0)
        queue.put(b"x")
        now.advance(2)
        queue.get_many(1, timeout=0)
        assert scraped(store)["millstream_queue_expired_total", ("queue", "mail")] == 1


def test_what_is_paused_or_not_sound_shows(store, monkeypatch):
    queue = store.queue("mail")
    queue.pause()
    with monkeypatch.context() as patch:
        patch.setattr(type(queue), "_health", lambda queue: "sync failed")
        found = scraped(store)
    assert found["millstream_queue_paused", ("queue", "mail")] == 1
    assert found["millstream_queue_health", ("queue", "mail")] == 0
    assert found["millstream_health",] == 0
    assert scraped(store)["millstream_health",] == 1


def test_an_empty_store_and_one_that_is_only_read(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        assert scraped(store) == {("millstream_health",): 1, ("millstream_members",): 1}
        filled(store).release()
        with millstream.open(tmp_path / "store", mode="r") as reader:
            assert scraped(reader).keys() == scraped(store).keys()


def test_what_is_dropped_while_it_is_read_is_left_out(store, monkeypatch):
    store.queue("gone", capacity=5)
    store.stream("gone", partitions=1)
    monkeypatch.setattr(type(store), "queues", lambda store: ["gone", "never"])
    monkeypatch.setattr(type(store), "streams", lambda store: ["never"])
    assert ("millstream_queue_capacity", ("queue", "gone")) in scraped(store)
    store.drop_queue("gone")
    assert scraped(store) == {("millstream_health",): 1, ("millstream_members",): 1}


def test_the_command_prints_what_the_parser_takes(tmp_path, capsys):
    with millstream.open(tmp_path / "store") as store:
        filled(store).release()
    assert main(["metrics", str(tmp_path / "store")]) == 0
    found = parsed(capsys.readouterr().out)
    assert found["millstream_queue_messages", ("queue", "mail"), ("state", "dead")] == 1


def test_the_command_serves_what_is_there_now(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        queue = store.queue("mail", capacity=5)
        command = [sys.executable, "-m", "millstream", "metrics", tmp_path / "store"]
        command += ["--listen", "127.0.0.1:0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            address = server.stderr.readline().removeprefix("serving ").strip()
            for count in range(3):
                with urllib.request.urlopen(address, timeout=60) as answer:
                    found = parsed(answer.read().decode())
                key = ("millstream_queue_messages", ("queue", "mail"), ("state", "ready"))
                assert found[key] == count
                queue.put(b"x")
            server.terminate()


@pytest.mark.parametrize("address", ["9464", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused(tmp_path, capsys, address):
    assert main(["metrics", str(tmp_path), "--listen", address]) == 2
    assert "expected HOST:PORT" in capsys.readouterr().err


def test_what_cannot_be_served_is_refused_with_its_reason(tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "store")
    millstream.open(path).close()
    assert main(["metrics", path, "--listen", "192.0.2.1:9464"]) == 3
    assert "192.0.2.1:9464: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "millstream.contrib.prometheus", None)
    assert main(["metrics", path]) == 3


def test_what_is_no_store_is_refused_at_once(tmp_path):
    with pytest.raises(millstream.InvalidType, match="expected a Store"):
        Collector(str(tmp_path))
