"""Logs in Java: Chronicle Queue and Aeron, from Maven Central, on the Java that is installed.

What is compiled and downloaded is kept in the user's cache between runs. Raises ImportError where
Java, Maven or the network is not there, which leaves them out with that reason.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent / "java"
SECONDS = 300.0
OPENED = (
    "java.lang", "java.lang.reflect", "java.io", "java.util", "java.nio", "sun.nio.ch",
    "jdk.internal.misc",
)  # fmt: skip
EXPORTED = ("java.base/jdk.internal.ref", "java.base/sun.nio.ch", "jdk.unsupported/sun.misc",
            "jdk.compiler/com.sun.tools.javac.file")  # fmt: skip
OPTIONS = (
    *(f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in OPENED),
    "--add-opens=jdk.compiler/com.sun.tools.javac=ALL-UNNAMED",
    *(f"--add-exports={name}=ALL-UNNAMED" for name in EXPORTED),
    "-Dchronicle.analytics.disable=true",
    "-Dchronicle.disk.monitor.disable=true",
)
"""As the authors of Chronicle and of Aeron ask of Java 17."""


@functools.cache
def classes() -> str:
    """The class path, downloaded and compiled."""
    missing = [name for name in ("java", "javac", "mvn") if shutil.which(name) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kept = Path(cache) / "millstream-benchmarks"
    kept.mkdir(parents=True, exist_ok=True)
    path = f"{kept / 'jars'}/*"
    copy = ("mvn", "-q", "-B", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies")
    try:
        if not (kept / "jars").exists():
            run(*copy, f"-DoutputDirectory={kept / 'new'}")
            (kept / "new").rename(kept / "jars")  # whole, or fetched again
        run("javac", "-cp", path, "-d", str(kept / "classes"), str(HERE / "Rivals.java"))
    except subprocess.CalledProcessError as error:
        lines = (error.stdout + error.stderr).strip().splitlines() or [str(error)]
        raise ImportError(f"{error.cmd[0]}: {lines[0]}") from error
    return f"{path}:{kept / 'classes'}"


def run(*command: str) -> str:
    """Run to the end; what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout


def command(engine: str, work: str, path: str, seconds: float) -> list[str]:
    """What runs a work of Rivals.java."""
    longer = max(seconds, 1.0)  # it is compiled while it runs: a tenth of a second shows little
    return ["java", *OPTIONS, "-cp", classes(), "Rivals", engine, work, path, str(longer)]


def alone(engine: str, work: str, path: str, seconds: float) -> float:
    """A rate of one process."""
    return float(run(*command(engine, work, path, seconds)).split()[-1])


def between(engine: str, path: str, seconds: float) -> float:
    """A rate from one process to another."""
    taking = command(engine, "consume", path, seconds)
    consumer = subprocess.Popen(taking, stdout=subprocess.PIPE, text=True)
    stop = threading.Timer(SECONDS, consumer.kill)
    stop.start()
    try:
        assert consumer.stdout is not None
        if consumer.stdout.readline() != "ready\n":
            raise OSError(f"{engine}: its consumer ended before it was ready")
        producer = subprocess.Popen(command(engine, "produce", path, seconds))
        try:
            return float(consumer.stdout.readline())
        finally:
            producer.kill()
            producer.wait()
    finally:
        stop.cancel()
        consumer.kill()
        consumer.wait()
        consumer.stdout.close()
