"""A real RabbitMQ on free ports of loopback, with a directory of its own; ended by its process.

Its packages are those of Debian's testing suite, unpacked into a cache and installed nowhere; it
runs from there in a mount namespace, so that root is needed.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

SUITE = "forky"
LEAST = (4, 3)
START_SECONDS = 120
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
PACKAGES = ["rabbitmq-server", "base-files", "dash", "coreutils", "sed", "grep", "hostname",
            "findutils"]  # fmt: skip
DEVICES = {"null": 3, "zero": 5, "random": 8, "urandom": 9}
"""Without them the runtime spins for ever instead of starting."""


def missing(reason):
    """A server that cannot be had fails CI, and skips elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def root():
    """The folder with the unpacked server; made where it is not there."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        missing("RabbitMQ runs here as root only, in a mount namespace")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "millstream-brokers"
    home.mkdir(parents=True, exist_ok=True)
    made = home / f"rabbitmq-{SUITE}"
    with (home / f"rabbitmq-{SUITE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "ok").exists():
            shutil.rmtree(made, ignore_errors=True)
            try:
                _unpack(made)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or b""
                missing(f"no RabbitMQ of Debian's {SUITE} here: {error} {said.decode()[-500:]}")
    return made / "root"


def _unpack(made):
    apt, top = made / "apt", made / "root"
    for name in ("etc/sources.list.d", "etc/preferences.d", "state/lists/partial",
                 "cache/archives/partial"):  # fmt: skip
        (apt / name).mkdir(parents=True)
    (apt / "etc/apt.conf.d").symlink_to("/etc/apt/apt.conf.d")
    (apt / "etc/sources.list").touch()
    (apt / "state/status").touch()  # nothing is installed: all that it needs comes along
    stanzas = [one for one in SOURCES.read_text().split("\n\n") if "security" not in one]
    text = re.sub(r"(?m)^Suites:.*", f"Suites: {SUITE}", "\n\n".join(stanzas))
    (apt / "etc/sources.list.d/x.sources").write_text(text + "\n")
    (apt / "apt.conf").write_text(
        f'Dir::Etc "{apt}/etc"; Dir::State "{apt}/state";'
        f' Dir::State::status "{apt}/state/status"; Dir::Cache "{apt}/cache";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}

    def run(*command):
        subprocess.run(command, check=True, env=environment, capture_output=True)

    run("apt-get", "-q", "update")
    run("apt-get", "-q", "install", "-y", "--no-install-recommends", "--download-only", *PACKAGES)
    for name in ("bin", "sbin", "lib", "lib64"):
        (top / "usr" / name).mkdir(parents=True)
        (top / name).symlink_to(f"usr/{name}")
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        run("dpkg", "-x", str(package), str(top))
    if not (top / "bin/sh").exists():
        (top / "bin/sh").symlink_to("dash")
    for name in ("dev", "proc", "tmp", "b", "etc"):
        (top / name).mkdir(exist_ok=True)
    (top / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (top / "etc/nsswitch.conf").write_text("hosts: files\n")
    (top / "etc/passwd").write_text("root:x:0:0:root:/b/home:/bin/sh\n")
    for name, minor in DEVICES.items():
        os.mknod(top / "dev" / name, 0o666 | 0o020000, os.makedev(1, minor))
    shutil.rmtree(apt)
    (made / "ok").touch()


class RabbitServer:
    """A server that can be killed and started again on the same ports and directory."""

    def __init__(self, folder, *, tls=None, configuration=""):
        self.folder = Path(folder)
        (self.folder / "home").mkdir(parents=True, exist_ok=True)
        self.port, self.stream_port = free_port(), free_port()
        self._names, self._dist = free_port(), free_port()
        self.address = f"rabbitmq://127.0.0.1:{self.port}?stream_port={self.stream_port}"
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            f"stream.listeners.tcp.1 = 127.0.0.1:{self.stream_port}",
            "stream.advertised_host = 127.0.0.1",
            f"stream.advertised_port = {self.stream_port}",
            "vm_memory_high_watermark.absolute = 1GB",
            "disk_free_limit.absolute = 100MB",
        ]
        if tls:
            for name in ("ca.pem", "server.pem", "server.key"):
                shutil.copy(Path(tls) / name, self.folder)
            tls_port, tls_stream_port = free_port(), free_port()
            self.tls_address = f"rabbitmq://127.0.0.1:{tls_port}?stream_port={tls_stream_port}"
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{tls_port}",
                f"stream.listeners.ssl.1 = 127.0.0.1:{tls_stream_port}",
                "ssl_options.cacertfile = /b/ca.pem",
                "ssl_options.certfile = /b/server.pem",
                "ssl_options.keyfile = /b/server.key",
            ]
        text = "\n".join([*lines, configuration, ""])
        (self.folder / "rabbitmq.conf").write_text(text)
        (self.folder / "enabled_plugins").write_text("[rabbitmq_stream].\n")
        self._process = self._name_server = None

    def _run(self, *command, log):
        """Start a command in the unpacked tree, with our folder as /b."""
        script = (
            'mount --bind "$1" "$0/b"; mount --bind /proc "$0/proc"; top=$0; shift;'
            ' exec chroot "$top" "$@"'
        )
        environment = {
            "PATH": "/usr/bin:/usr/sbin:/usr/lib/rabbitmq/bin", "HOME": "/b/home",
            "LANG": "C.UTF-8", "ERL_EPMD_PORT": str(self._names),
            "ERL_EPMD_ADDRESS": "127.0.0.1", "RABBITMQ_NODENAME": "rabbit@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist), "RABBITMQ_MNESIA_BASE": "/b/data",
            "RABBITMQ_LOG_BASE": "/b/log", "RABBITMQ_LOGS": "/b/server.log",
            "RABBITMQ_CONFIG_FILE": "/b/rabbitmq.conf", "RABBITMQ_PID_FILE": "/b/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "/b/enabled_plugins",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS":
                "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none",
            "RABBITMQ_ALLOW_INPUT": "1", "RABBITMQ_SERVER_START_ARGS": "-noinput",
        }  # fmt: skip
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(
                ["unshare", "-m", "sh", "-c", script, root(), self.folder, *command],
                env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def start(self):
        if self._name_server is None:
            self._name_server = self._run(
                "epmd", "-address", "127.0.0.1", "-port", str(self._names), log="epmd.log"
            )
            # Else the server starts one of its own, which stays when both are ended.
            self._wait_for(self._names, self._name_server)
        self._process = self._run("/usr/lib/rabbitmq/bin/rabbitmq-server", log="out.log")
        for port in (self.port, self.stream_port):
            self._wait_for(port, self._process)
        return self

    def _wait_for(self, port, process):
        """Return when a process listens there."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                assert time.monotonic() < end, self._said()
                with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on
                    process.wait(0.05)
                    pytest.fail(self._said())

    def _said(self):
        logs = [self.folder / name for name in ("epmd.log", "out.log")]
        said = "".join(one.read_text()[-2000:] for one in logs if one.exists())
        return f"the server does not start: {said}"

    def ctl(self, *words):
        """Run one of the server's own commands; what it prints."""
        process = self._run(f"/usr/lib/rabbitmq/bin/{words[0]}", *words[1:], log="ctl.log")
        process.wait(60)
        said = (self.folder / "ctl.log").read_text()
        (self.folder / "ctl.log").unlink()
        assert process.returncode == 0, said
        return said

    def kill(self):
        """End it as a power switch does its process: SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def revive(self):
        if self._process.poll() is not None:
            self.start()

    def stop(self):
        for process in (self._process, self._name_server):
            if process is not None:
                process.kill()
                process.wait()
        self._process = self._name_server = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *raised):
        self.stop()
