"""The programs of docs/guide/web.md under real servers, which are killed, reloaded and stopped."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from timing import until

import millstream

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "web.md"
PROGRAM = re.compile(r"^```python\n(# ([\w.]+\.py).*?)^```", re.M | re.S)
UVICORN = ["-m", "uvicorn", "asgi_app:app", "--workers", "2", "--log-level", "warning"]
GUNICORN = ["-m", "gunicorn", "-c", "gunicorn.conf.py", "--log-level", "warning"]
SERVERS = {
    "uvicorn": (["fastapi", "uvicorn"], UVICORN),
    "gunicorn": (["flask", "gunicorn"], [*GUNICORN, "wsgi_app:app"]),
    "gunicorn, threads": (
        ["flask", "gunicorn"],
        [*GUNICORN, "-k", "gthread", "--threads", "4", "wsgi_app:app"],
    ),
}


class Site:
    """A web server and a worker over one store, and a client."""

    def __init__(self, directory, name):
        self.needs, self.words = SERVERS[name]
        for package in self.needs:
            pytest.importorskip(package)
        for text, file in PROGRAM.findall(PAGE.read_text()):
            (directory / file).write_text(text)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.directory, self.store = directory, directory / "store"
        self.env = {**os.environ, "STORE": str(self.store), "BIND": f"127.0.0.1:{self.port}"}
        self.processes = []

    def start(self, *words):
        command = [sys.executable, *words]
        process = subprocess.Popen(command, cwd=self.directory, env=self.env)
        self.processes.append(process)
        return process

    def serve(self):
        more = ["--port", str(self.port)] if "uvicorn" in self.words else []
        server = self.start(*self.words, *more)
        until(self.answers)
        return server

    def answers(self):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/status")[0] == 200

    def ask(self, method, path, body=None):
        """Status and body of an answer; OSError and the like where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, body):
        """The id of a job that was accepted."""
        status, answer = self.ask("POST", "/jobs", body)
        assert status == 202, answer
        return json.loads(answer)["id"]

    def result(self, number):
        status, answer = self.ask("GET", f"/jobs/{number}")
        return answer if status == 200 else None

    def stored(self):
        """The ids of the jobs that are in the queue."""
        with millstream.open(self.store, mode="r") as store:
            queue = store.queue("jobs", create=False)
            return {one.headers["id"].decode() for one in queue.peek(100_000)}

    def children(self, server):
        command = ["pgrep", "-P", str(server.pid)]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found if "resource_tracker" not in words_of(pid)]

    def end(self):
        for process in self.processes:
            children = self.children(process)
            process.kill()
            process.wait()
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def words_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@pytest.fixture(params=["uvicorn", "gunicorn, threads"])
def site(request, tmp_path):
    site = Site(tmp_path, request.param)
    yield site
    site.end()


class Clients:
    """Threads that post without a pause, and keep the ids that were answered."""

    def __init__(self, site, count=3):
        self.site, self.accepted, self.failed = site, [], 0
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(count)]

    def run(self):
        while not self.over.is_set():
            try:
                self.accepted.append(self.site.post(b"x"))
            except (OSError, http.client.HTTPException):
                self.failed += 1
            except BaseException:
                self.over.set()
                raise

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *raised):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def await_more(self, count=20):
        wanted = len(self.accepted) + count
        until(lambda: len(self.accepted) >= wanted or self.over.is_set())
        assert not self.over.is_set()


def test_every_program_of_the_page_is_run(tmp_path):
    names = {file for _, file in PROGRAM.findall(PAGE.read_text())}
    assert names == {"asgi_app.py", "gunicorn.conf.py", "worker.py", "wsgi_app.py"}
    assert find_spec("millstream")


def test_a_job_from_request_to_result(site):
    server = site.serve()
    number = site.post(b"to ann")
    assert site.result(number) is None
    status = json.loads(site.ask("GET", "/status")[1])
    assert status == {"ready": 1, "delayed": 0, "leased": 0, "dead": 0, "health": "sound"}
    worker = site.start("worker.py")
    until(lambda: site.result(number) == b"TO ANN")
    worker.terminate()
    assert worker.wait() == 0
    server.terminate()
    server.wait()
    with millstream.open(site.store, mode="r") as store:
        assert len(store.queue("jobs")) == 0


def test_what_was_answered_survives_kills(site):
    server = site.serve()
    with Clients(site) as clients:
        for _ in range(2):
            clients.await_more()
            killed = site.children(server)[0]
            os.kill(killed, signal.SIGKILL)
            until(lambda killed=killed: killed not in site.children(server))
            until(site.answers)
        clients.await_more()
        os.kill(server.pid, signal.SIGSTOP)  # its workers get no help, and it makes no new ones
        for child in site.children(server):
            os.kill(child, signal.SIGKILL)
        server.kill()
        server.wait()
    print(len(clients.accepted), "accepted,", clients.failed, "without an answer")
    assert set(clients.accepted) <= site.stored()


@pytest.fixture
def gunicorn(tmp_path):
    site = Site(tmp_path, "gunicorn, threads")
    yield site
    site.end()


def test_reloaded_by_hup_no_request_is_lost(gunicorn):
    server = gunicorn.serve()
    with Clients(gunicorn) as clients:
        for _ in range(2):
            before = set(gunicorn.children(server))
            os.kill(server.pid, signal.SIGHUP)
            until(lambda before=before: len(set(gunicorn.children(server)) - before) == 2)
            until(lambda before=before: not before & set(gunicorn.children(server)))
            clients.await_more()
    assert clients.failed == 0
    assert set(clients.accepted) == gunicorn.stored()
    server.terminate()
    assert server.wait() == 0


def test_a_graceful_stop_ends_what_is_under_way(gunicorn):
    server = gunicorn.serve()
    with Clients(gunicorn) as clients:
        clients.await_more()
        server.terminate()
        assert server.wait() == 0
    assert set(clients.accepted) <= gunicorn.stored()


def test_a_store_that_cannot_be_opened_is_said_before_anything_is_served(tmp_path):
    site = Site(tmp_path, "gunicorn")
    site.store.write_text("no directory")
    command = [sys.executable, *site.words]
    done = subprocess.run(
        command, cwd=site.directory, env=site.env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert str(site.store) in done.stderr
