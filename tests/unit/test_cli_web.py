"""`millstream web`: JSON over HTTP, who may act, and the page in a headless Chromium."""

import contextlib
import http.client
import json
import subprocess
import sys
import threading

import pytest
from chromium import PROGRAM, Chromium

import millstream
from millstream.cli import build_parser, main
from millstream.cli.picture import Watch, decoded
from millstream.cli.web import Access, access_of
from millstream.cli.web_server import Server

TOKEN = "a long secret"
ONCE = millstream.RetryPolicy(max_attempts=1)


@pytest.fixture
def filled(tmp_path):
    """A store with streams, a group that is behind, queues, and two dead letters."""
    with millstream.open(tmp_path / "store") as store:
        events = store.stream("events", partitions=2)
        events.append_many([b'{"n": 1}', b"two", b"\xff\x00"], partition=0, keys=[b"k"] * 3)
        with events.consumer("readers", max_records=1) as consumer:
            consumer.poll()
            consumer.commit()
        mail = store.queue("mail", retry=ONCE)
        mail.put_many([b'{"to": "ann"}', b"b", b"c", b"<b>bold</b>"])
        for _ in range(2):
            with pytest.raises(ValueError), mail.get(timeout=5):
                raise ValueError("no such address <script>alert(1)</script>")
        store.flush()
        yield store


READING, ACTING = Access(None, False, True), Access(TOKEN, True, True)


@contextlib.contextmanager
def served(store, access=READING, every=0.2):
    watch = Watch(store.path)
    server = Server(("127.0.0.1", 0), watch, access, every)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        watch.close()


def asked(port, method, path, body=None, token=None, **headers):
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, headers)
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    if answer.headers["Content-Type"] == "application/json":
        return answer.status, json.loads(found)
    return answer.status, found.decode()


ACTIONS = [
    ("/api/queues/mail/dead/redrive", {}, {"redriven": 2}),
    ("/api/queues/mail/dead/purge", {}, {"purged": 2}),
    ("/api/queues/mail/purge", {}, {"purged": 2}),
    ("/api/queues/mail/pause", {}, {"paused": True}),
    ("/api/queues/mail/resume", {}, {"paused": False}),
    (
        "/api/streams/events/groups/readers/seek",
        {"to": "latest"},
        {"positions": {"0": 3, "1": 0}},
    ),
]


def test_what_the_store_has_as_json(filled):
    with served(filled) as port:
        status, store = asked(port, "GET", "/api/store")
        assert (status, store["health"], store["members"], store["acts"]) == (
            200,
            "sound",
            1,
            False,
        )
        (stream,) = store["streams"]
        assert (stream["name"], stream["records"], stream["groups"][0]["lag"]) == ("events", 3, 2)
        (queue,) = store["queues"]
        assert (queue["ready"], queue["dead"], queue["put"], queue["failed"]) == (2, 2, 4, 2)
        assert store["processes"][0]["here"] is True
        _, partitions = asked(port, "GET", "/api/streams/events")
        assert [part["next_offset"] for part in partitions["partitions"]] == [3, 0]
        _, group = asked(port, "GET", "/api/streams/events/groups/readers")
        assert [part["lag"] for part in group["partitions"]] == [2, 0]
        _, records = asked(port, "GET", "/api/streams/events/partitions/0?start=1")
        assert [one["value"].get("text") for one in records["records"]] == ["two", None]
        assert records["records"][1]["value"]["hex"] == "ff00"
        _, messages = asked(port, "GET", "/api/queues/mail/messages?count=1")
        assert [one["value"]["text"] for one in messages] == ["c"]
        _, letters = asked(port, "GET", "/api/queues/mail/dead")
        assert letters[0]["value"]["json"] == {"to": "ann"}
        assert "Traceback (most recent call last)" in letters[0]["traceback"]
        assert asked(port, "GET", "/api/queues/mail")[1]["capacity"] > 0
        for path in (
            "/api/queues/no",
            "/api/streams/no",
            "/api/no",
            "/no",
            "/api/streams/events/x",
        ):
            status, found = asked(port, "GET", path)
            assert (status, list(found)) == (404, ["error"])
        assert asked(port, "GET", "/api/queues/mail/dead?count=x")[0] == 400


def test_parts_of_the_picture_are_given_as_well(filled):
    with served(filled) as port:
        store = asked(port, "GET", "/api/store")[1]
        for kind in ("streams", "queues", "processes"):
            assert asked(port, "GET", f"/api/{kind}") == (200, store[kind])
        (events,) = (one for one in store["streams"] if one["name"] == "events")
        assert asked(port, "GET", "/api/streams/events/groups") == (200, events["groups"])
        assert asked(port, "GET", "/api/streams/none/groups")[0] == 404


def test_rates_and_history_come_with_time(filled, monkeypatch):
    monkeypatch.setattr("millstream.cli.picture.STEP_SECONDS", 0.0)
    with served(filled) as port:
        queue, rates = filled.queue("mail"), []
        while not rates or not rates[-1]:
            queue.put_many([b"x"] * 10)
            rates.append(asked(port, "GET", "/api/store")[1]["queues"][0]["put_rate"])
        _, history = asked(port, "GET", "/api/history?of=queues/mail")
        assert set(history["series"]) == {
            f"queues/mail/{name}" for name in ("ready", "leased", "dead", "put", "done", "failed")
        }
        assert len(history["at"]) == len(history["series"]["queues/mail/ready"]) > 0
        assert asked(port, "GET", "/api/history?of=queues/other")[0] == 404


@pytest.mark.parametrize(("path", "body", "came"), ACTIONS)
def test_who_has_the_token_may_act(filled, path, body, came):
    with served(filled, ACTING) as port:
        for token in (None, "another secret", TOKEN + "x"):
            status, found = asked(port, "POST", path, body, token)
            assert status == 403 and "token" in found["error"]
        assert asked(port, "POST", path, body, TOKEN) == (200, came)


@pytest.mark.parametrize(("path", "body", "came"), ACTIONS)
def test_a_key_that_is_unknown_is_refused_and_nothing_is_done(filled, path, body, came):
    unknown = "id" if "/dead/" in path or "seek" in path else "ids"
    with served(filled, ACTING) as port:
        status, found = asked(port, "POST", path, {**body, unknown: ["1"]}, TOKEN)
        _, group = asked(port, "GET", "/api/streams/events/groups/readers")
    assert status == 400
    assert [part["lag"] for part in group["partitions"]] == [2, 0]
    assert found["error"].startswith(f"{unknown}: ")
    stats = filled.queue("mail").stats()
    assert (stats.ready, stats.dead, stats.paused) == (2, 2, False)


def test_a_wrong_value_is_a_bad_request_also_while_the_group_has_members(filled):
    path = "/api/streams/events/groups/readers/seek"
    with served(filled, ACTING) as port, filled.stream("events").consumer("readers") as consumer:
        consumer.poll()
        for to in (1_000_000, "nowhere", 10**30, 1.5):
            assert asked(port, "POST", path, {"to": to}, TOKEN)[0] == 400


def test_a_history_of_what_is_not_there_is_not_found(filled):
    with served(filled) as port:
        for of in ("", "queues", "queues/mail", "streams/events/groups/readers"):
            assert asked(port, "GET", f"/api/history?of={of}")[0] == 200
        for of in ("queues/nope", "streams/events/groups/nope", "nope"):
            status, found = asked(port, "GET", f"/api/history?of={of}")
            assert (status, list(found)) == (404, ["error"])


def test_nobody_may_act_where_it_is_read_only(filled):
    with served(filled) as port:
        for path, body, _ in ACTIONS:
            status, found = asked(port, "POST", path, body, TOKEN)
            assert status == 403 and "--allow-actions" in found["error"]
    assert len(filled.queue("mail").dead) == 2


def test_some_dead_letters_and_bad_requests(filled):
    dead = filled.queue("mail").dead
    first, second = (letter.id for letter in dead.list())
    with served(filled, ACTING) as port:
        path = "/api/queues/mail/dead/redrive"
        assert asked(port, "POST", path, {"ids": [str(first)]}, TOKEN) == (200, {"redriven": 1})
        assert asked(port, "POST", path, {"ids": [first]}, TOKEN) == (200, {"redriven": 0})
        for body in ({"ids": "all"}, {"ids": [-1]}, {"ids": ["x"]}, [1], "text"):
            assert asked(port, "POST", path, body, TOKEN)[0] == 400
        seek = "/api/streams/events/groups/readers/seek"
        for body in ({}, {"to": True}, {"to": "never"}, {"to": 0, "partition": "0"}):
            assert asked(port, "POST", seek, body, TOKEN)[0] == 400
        assert asked(port, "POST", seek, {"to": 1, "partition": 0}, TOKEN)[0] == 200
        assert asked(port, "POST", "/api/queues/no/purge", {}, TOKEN)[0] == 404
        for method, refused in (("PUT", 405), ("DELETE", 405), ("OPTIONS", 405), ("BREW", 501)):
            status, found = asked(port, method, path, {}, TOKEN)
            assert (status, list(found)) == (refused, ["error"])
        for length in ("70000", "-1", "\xb2", "9" * 5_000):  # Python's isdigit() takes "\xb2"
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.putrequest("POST", path)
            connection.putheader("Content-Length", length)
            connection.endheaders()
            assert connection.getresponse().status == 413
            connection.close()
    assert [letter.id for letter in dead.list()] == [second]


def test_other_names_and_pages_are_refused(filled):
    with served(filled, ACTING) as port:
        for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example"):
            status, found = asked(port, "GET", "/api/store", Host=host)
            assert status == 403 and "Host" in found["error"]
        for host in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert asked(port, "GET", "/api/store", Host=host)[0] == 200
        status, found = asked(port, "POST", ACTIONS[0][0], {}, TOKEN, Origin="http://evil.example")
        assert status == 403 and "Origin" in found["error"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        answer = connection.getresponse()
        page = answer.read().decode()
        connection.close()
        assert answer.status == 200 and "<title>millstream</title>" in page
        assert "Access-Control-Allow-Origin" not in answer.headers
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace(
            "http-equiv", ""
        )


def test_off_loopback_reading_needs_the_token_as_well(filled):
    with served(filled, Access(TOKEN, False, False)) as port:
        assert asked(port, "GET", "/")[0] == 200
        assert asked(port, "GET", "/api/store")[0] == 403
        assert asked(port, "GET", "/api/store", token=TOKEN, Host="any.example")[0] == 200
        assert asked(port, "POST", ACTIONS[0][0], {}, TOKEN)[0] == 403


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--listen", "0.0.0.0:0"], "--token"),
        (["--listen", "192.168.1.1:0"], "--token"),
        (["--allow-actions"], "--token"),
        (["--token", ""], "ASCII"),
        (["--token", "schlüssel"], "ASCII"),
        (["--listen", "0.0.0.0:0", "--token", "short"], "8 characters"),
        (["--listen", "203.0.113.1:9", "--token", TOKEN], "--listen 203.0.113.1:9"),
    ],
)
def test_what_would_not_be_safe_is_refused_at_the_start(filled, capsys, options, why):
    assert main(["web", filled.path, *options]) == 3
    assert why in capsys.readouterr().err


def test_a_token_may_be_short_on_loopback():
    words = ["web", "store", "--allow-actions", "--token", "T"]
    assert access_of(build_parser().parse_args(words)) == Access("T", True, True)


def test_the_command_serves_and_prints(filled, capsys):
    command = [sys.executable, "-m", "millstream", "web", filled.path, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        port = int(server.stderr.readline().rstrip("/\n").rpartition(":")[2])
        assert asked(port, "GET", "/api/store")[1]["path"] == filled.path
        server.terminate()
    assert main(["web", filled.path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queues"][0]["name"] == "mail"


def test_it_goes_on_when_the_store_is_opened_anew(filled):
    path = filled.path
    with served(filled) as port:
        assert asked(port, "GET", "/api/store")[1]["members"] == 1
        filled.close()
        assert asked(port, "GET", "/api/store")[0] == 200
        with millstream.open(path) as again:
            again.queue("mail").put(b"new")
            found = {}
            while found.get("members") != 1 or found["queues"][0]["ready"] != 3:
                status, found = asked(port, "GET", "/api/store")
                assert status == 200, found


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, None),
        (b"", {"bytes": 0, "text": ""}),
        (b"text\n", {"bytes": 5, "text": "text\n"}),
        (b"[1]", {"bytes": 3, "text": "[1]", "json": [1]}),
        (b"{no", {"bytes": 3, "text": "{no"}),
        (b"\x00\xff", {"bytes": 2, "hex": "00ff"}),
        (b"\x1b[31m", {"bytes": 5, "hex": "1b5b33316d"}),
        (b"[" * 100_000, {"bytes": 100_000, "cut": True, "text": "[" * 4096}),
    ],
)
def test_bytes_are_told_as_what_they_are(data, said):
    assert decoded(data) == said


# --- in a browser ---------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium here")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(400, False), (1600, True)])
def test_the_page_loads_updates_and_redrives(filled, tmp_path, width, dark):
    browser = Chromium(dark=dark)
    try:
        with served(filled, ACTING) as port:
            browser.answer = TOKEN
            browser.size(width)
            browser.go(f"http://127.0.0.1:{port}/")
            browser.until("document.querySelectorAll('#queues tbody tr').length === 1")
            assert browser.run("document.documentElement.scrollWidth") <= width
            back = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, back[4:-1].split(","))) < 200) is dark
            filled.queue("another").put(b"x")
            browser.until("document.querySelectorAll('#queues tbody tr').length === 2")
            browser.run("[...document.querySelectorAll('#queues tbody tr')].at(-1).click()")
            browser.until("document.querySelectorAll('#letters details').length === 2")
            assert "Traceback" in browser.run("byId('letters').textContent")
            assert browser.run("document.querySelectorAll('#letters script').length") == 0
            browser.picture(tmp_path / "queue.png")
            browser.run("""[...document.querySelectorAll('#acts button')]
                .find((one) => one.textContent.startsWith('Redrive')).click()""")
            browser.until("document.querySelectorAll('#letters details').length === 0")
            assert len(filled.queue("mail").dead) == 0
            browser.run("byId('close').click()")
            browser.run("document.querySelector('#streams tbody tr').click()")
            browser.until("byId('title').textContent === 'stream events'")
            browser.run("document.querySelector('#in tbody tr').click()")
            browser.until("byId('in').textContent.includes('two')")
            assert browser.complaints() == []
    finally:
        browser.close()
