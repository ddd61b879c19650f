"""A store with damaged files, opened, read, verified and written by the Python face.

`python tests/fuzz/fuzz_store.py [SECONDS]` looks for more, with atheris where that is installed.
The suite replays a few hundred inputs (tests/unit/test_fuzz.py). Only errors of millstream are
allowed, whatever the bytes are.
"""

import contextlib
import functools
import gc
import importlib
import logging
import os
import pkgutil
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

import millstream
from millstream import MillstreamError, inspect
from millstream.disk import files

FOUND: list[bytes] = [
    bytes.fromhex("4f2fc53165393939393939c456610000000000000000210120feefffc1c950b725"),
    bytes.fromhex("862423fee0cb3feaed344eb11136fe5745a04fea41d5"),
]  # fmt: skip
"""Inputs that once failed."""
PAGE = 4096
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where stores are made by the thousand."""
WORDS = (b"\x00" * 8, b"\xff" * 8, b"\x00\x00\x00\x80" * 2, b"\xff\xff\xff\x7f" * 2, b"1e999999")


def build(path: Path) -> None:
    """A store with all that there is, closed in order."""
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", partitions=2, segment_bytes=1 << 20)
        stream.append_many([b"%d" % i for i in range(40)], keys=[b"k%d" % i for i in range(40)])
        queue = store.queue("q", capacity=64, codec=None, dedup_window=3600.0)
        queue.put_many([b"small", b"large" * 2000])
        queue.put(b"later", delay=3600.0, dedup_id="once")
        queue.get(timeout=0).reject("no")
        with stream.consumer("g", start="earliest") as consumer:
            while consumer.poll(0.0) is not None:
                consumer.commit()
        with store.transaction() as transaction:
            transaction.append(stream, b"x", key=b"k1")
            transaction.put(queue, b"y")


@functools.lru_cache(maxsize=4)
def image(built: Path) -> list[tuple[Path, int, list[tuple[int, bytes]]]]:
    """Each file's path, size, and pages that are not zero: a small part of it."""
    found = []
    for file in sorted(one for one in built.rglob("*") if one.is_file()):
        pages = []
        with file.open("rb") as opened:
            size, at = file.stat().st_size, 0
            while at < size:
                try:
                    at = os.lseek(opened.fileno(), at, os.SEEK_DATA) // PAGE * PAGE
                except OSError:  # no more
                    break
                raw = os.pread(opened.fileno(), PAGE, at)
                if raw.strip(b"\0"):
                    pages.append((at, raw))
                at += PAGE
        found.append((file.relative_to(built), size, pages))
    return found


def copy(built: Path, path: Path) -> None:
    """Without what is zero."""
    for name, size, pages in image(built):
        to = path / name
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("wb", buffering=0) as target:
            target.truncate(size)
            for at, raw in pages:
                os.pwrite(target.fileno(), raw, at)


def damage(path: Path, built: Path, data: bytes) -> None:
    """Eleven bytes an edit: which file, where in what is not zero of it, what to write there."""
    files = [one for one in image(built) if one[2]]
    for at in range(0, len(data) - 10, 11):
        name, size, pages = files[data[at] % len(files)]
        place = int.from_bytes(data[at + 1 : at + 3], "little")
        # Half of them near the beginning, where the headers are.
        first, raw = pages[0] if place & 1 else pages[(place >> 10) % len(pages)]
        where = min(first + (place >> 1) % 512 * 8 % len(raw), size)
        edit = data[at + 3 : at + 11]
        if edit[:1] == b"\xfe":  # the file ends here
            os.truncate(path / name, where)
        else:
            with (path / name).open("r+b") as opened:
                opened.seek(where)
                opened.write(edit)


def use(path: Path, mode: str) -> None:
    """Do all that can be done with a store."""
    try:
        store = millstream.open(path, mode=mode)
    except MillstreamError:
        return
    tries = [
        lambda: [list(batch.values) for batch in store.stream("s").read()],
        lambda: store.stream("s").stats(),
        lambda: store.queue("q").stats(),
        lambda: store.queue("q").peek(10),
        lambda: store.queue("q").dead.list(),
        lambda: store.stream("s").groups(),
    ]
    if mode == "rw":
        tries += [
            lambda: store.stream("s").append(b"more", key=b"k"),
            lambda: [m.ack() for m in store.queue("q").get_many(10, timeout=0)],
            lambda: store.queue("q").put(b"more", dedup_id="once", timeout=0),
            lambda: poll(store),
        ]
    for attempt in tries:
        with contextlib.suppress(MillstreamError):
            attempt()
    with contextlib.suppress(MillstreamError):
        store.close()


def poll(store: millstream.Store) -> None:
    """Read on as a group."""
    with store.stream("s").consumer("g") as consumer:
        while consumer.poll(0.0) is not None:
            consumer.commit()


def check_nothing_runs() -> None:
    """What could not be opened, or was closed, has no thread."""
    left = [thread for thread in threading.enumerate() if thread.name.startswith("millstream")]
    assert left == [], left


def one_input(data: bytes, built: Path) -> None:
    """Damage a copy and use it."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        path = Path(name) / "store"
        copy(built, path)
        damage(path, built, data)
        use(path, "r")
        with contextlib.suppress(MillstreamError):
            inspect.verify(path)
        use(path, "rw")
        check_nothing_runs()
        text = Path(name) / "json"
        text.write_bytes(data)
        with contextlib.suppress(MillstreamError):
            files.read_json(text)


def inputs(count: int, seed: int) -> list[bytes]:
    """Random edits, of words that are often at fault."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        data = b""
        for _ in range(source.randint(1, 3)):
            word = source.choice([*WORDS, source.randbytes(8), b"\xfe" + source.randbytes(7)])
            data += source.randbytes(3) + word
        found.append(data)
    return found


def instrument(atheris: ModuleType) -> None:
    """Count what runs of millstream; `instrument_all` takes minutes, over all of Python."""
    for module in pkgutil.walk_packages(millstream.__path__, "millstream."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and (one.__module__ or "").startswith("millstream"):
            atheris.instrument_func(one)


def search(
    build: Callable[[Path], None],
    one_input: Callable[[bytes, Path], None],
    inputs: Callable[[int, int], list[bytes]],
    found: list[bytes],
) -> None:
    """Look for more, as many seconds as the command line says."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        built = Path(name) / "built"
        build(built)
        try:
            import atheris
        except ImportError:
            search_at_random(seconds, one_input, inputs, built)
            return
        instrument(atheris)
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for number, data in enumerate([*found, *inputs(200, 1)]):
            (corpus / f"{number}").write_bytes(data)
        options = [f"-max_total_time={seconds:.0f}", "-timeout=60", "-rss_limit_mb=4096"]
        options += ["-max_len=200", str(corpus)]
        atheris.Setup([sys.argv[0], *options], lambda data: one_input(data, built))
        atheris.Fuzz()


def search_at_random(
    seconds: float,
    one_input: Callable[[bytes, Path], None],
    inputs: Callable[[int, int], list[bytes]],
    built: Path,
) -> None:
    """Without atheris: other random edits each time."""
    begin, seed = time.monotonic(), time.time_ns()
    count, last = 0, b""
    try:
        while time.monotonic() < begin + seconds:
            for last in inputs(10, seed + count):
                one_input(last, built)
                count += 1
    except BaseException:
        print(f"after {count} inputs: {last.hex()}", flush=True)
        raise
    print(f"{count} inputs in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    search(build, one_input, inputs, FOUND)
