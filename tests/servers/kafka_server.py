"""A real Kafka of one node on free ports of loopback, with a directory of its own.

It is ended by its process. The jars come from Maven Central, once: they are kept in the user's
cache. It needs Java 17 or later.
"""

import base64
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from nats_server import free_port

VERSION = "4.4.0"
LOG4J = "2.25.5"
START_SECONDS = 60
POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>x</groupId><artifactId>node</artifactId><version>1</version><packaging>pom</packaging>
<dependencies><dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
<version>{VERSION}</version></dependency><dependency><groupId>org.apache.logging.log4j</groupId>
<artifactId>log4j-slf4j-impl</artifactId><version>{LOG4J}</version></dependency></dependencies>
</project>
"""
LOGGING = """Configuration:
  Appenders: {Console: {name: C, target: SYSTEM_OUT, PatternLayout: {pattern: "%d %p %c{1} %m%n"}}}
  Loggers: {Root: {level: WARN, AppenderRef: {ref: C}}}
"""
SETTINGS = """process.roles=broker,controller
node.id=1
controller.listener.names=CONTROLLER
num.partitions=1
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.retention.check.interval.ms=1000
log.cleaner.backoff.ms=500
log.initial.task.delay.ms=500
"""


def missing(reason):
    """Skip on a user's machine; fail where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def libraries():
    """The folder with the jars of the pinned version, fetched where it is not there yet."""
    java = shutil.which("java")
    said = subprocess.run([java, "-version"], capture_output=True, text=True).stderr if java else ""
    found = re.search(r'version "(\d+)', said)
    if found is None or int(found[1]) < 17:
        missing(f"Kafka {VERSION} needs Java 17 or later; there is {said.partition(chr(10))[0]!r}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "millstream-servers" / f"kafka-{VERSION}"
    if not folder.exists():
        maven = shutil.which("mvn")
        if maven is None:
            missing(f"no mvn here, which fetches Kafka {VERSION} from Maven Central")
        work = folder.with_name(f".{folder.name}.{os.getpid()}")
        work.mkdir(parents=True)
        (work / "pom.xml").write_text(POM)
        command = [maven, "-q", "-B", f"-Dmaven.repo.local={work}/repository",
                   "dependency:copy-dependencies", f"-DoutputDirectory={work}/libs"]  # fmt: skip
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(work)
            missing(f"Kafka {VERSION} cannot be fetched: {done.stdout[-500:]}{done.stderr[-500:]}")
        shutil.rmtree(work / "repository")
        with contextlib.suppress(OSError):  # another run was first
            work.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    return folder / "libs"


class KafkaServer:
    """A broker that can be killed and started again on the same ports and directory.

    The listener USERS knows ann, whose password is secret, and where there are `certificates`
    (server.pem and server.key in that folder) the listener TLS has them.

    `settings`: more lines of its server.properties. The listener
    VIA is advertised at the port `proxied`, where a proxy that leads to `via` may listen.
    """

    def __init__(self, folder, settings="", certificates=None):
        self.folder = Path(folder)
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        names = ["PLAINTEXT", "VIA", "INSIDE", "USERS", "CONTROLLER", *["TLS"] * bool(certificates)]
        self.ports = {name: free_port() for name in names}
        self.port, self.via, self.proxied = self.ports["PLAINTEXT"], self.ports["VIA"], free_port()
        self.address = f"kafka://127.0.0.1:{self.port}"
        self._process = None
        self._jars = libraries()
        where = {name: f"{name}://127.0.0.1:{port}" for name, port in self.ports.items()}
        seen = {**where, "VIA": f"VIA://127.0.0.1:{self.proxied}"}
        del seen["CONTROLLER"]
        kinds = {"USERS": "SASL_PLAINTEXT", "TLS": "SSL"}
        protocols = ",".join(f"{name}:{kinds.get(name, 'PLAINTEXT')}" for name in names)
        login = "org.apache.kafka.common.security"
        lines = [
            f"controller.quorum.bootstrap.servers=127.0.0.1:{self.ports['CONTROLLER']}",
            f"listeners={','.join(where.values())}",
            f"advertised.listeners={','.join(seen.values())}",
            "inter.broker.listener.name=INSIDE",
            f"listener.security.protocol.map={protocols}",
            f"log.dirs={self.folder}/data",
            "listener.name.users.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256",
            f"listener.name.users.plain.sasl.jaas.config={login}.plain.PlainLoginModule required"
            ' user_ann="secret";',
            f"listener.name.users.scram-sha-256.sasl.jaas.config={login}.scram.ScramLoginModule"
            " required;",
        ]
        if certificates:
            parts = [Path(certificates, name).read_text() for name in ("server.key", "server.pem")]
            (self.folder / "keystore.pem").write_text("".join(parts))
            lines += [
                "listener.name.tls.ssl.keystore.type=PEM",
                f"listener.name.tls.ssl.keystore.location={self.folder}/keystore.pem",
            ]
        (self.folder / "log4j2.yaml").write_text(LOGGING)
        (self.folder / "server.properties").write_text("\n".join([SETTINGS, *lines, settings, ""]))

    def java(self, name, *arguments):
        """The command of one of Kafka's programs."""
        return [
            "java", "-Xmx512m", "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            f"-Dlog4j2.configurationFile={self.folder}/log4j2.yaml",
            f"-Dkafka.logs.dir={self.folder}", "-cp", f"{self._jars}/*", name, *arguments,
        ]  # fmt: skip

    def format(self):
        identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        subprocess.run(
            self.java("kafka.tools.StorageTool", "format", "--standalone", "-t", identity,
                      "-c", f"{self.folder}/server.properties",
                      "--add-scram", "SCRAM-SHA-256=[name=ann,password=secret]"),
            check=True, capture_output=True,
        )  # fmt: skip
        return self

    def start(self):
        if not any((self.folder / "data").iterdir()):
            self.format()
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self.java("kafka.Kafka", f"{self.folder}/server.properties"),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                assert time.monotonic() < end, (self.folder / "log").read_text()[-4000:]
                with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on, as it should
                    self._process.wait(0.1)
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
