"""A store with damaged files, opened, read, verified and written by the Python face.

`python tests/fuzz/fuzz_store.py [SECONDS]` looks for more, with atheris where that is installed.
The suite replays a few hundred inputs (tests/unit/test_fuzz.py). Only errors of millstream are
allowed, whatever the bytes are.
"""

import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import millstream
from millstream import MillstreamError, files, inspect

FOUND: list[bytes] = []
"""Inputs that once failed."""
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


def copy(built: Path, path: Path) -> None:
    """Without what is zero: most of a file."""
    for file in sorted(built.rglob("*")):
        to = path / file.relative_to(built)
        if file.is_dir():
            to.mkdir(parents=True, exist_ok=True)
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, to.open("wb") as target:
            size, at = file.stat().st_size, 0
            target.truncate(size)
            while at < size:
                raw = os.pread(source.fileno(), 1 << 20, at)
                if raw.strip(b"\0"):
                    os.pwrite(target.fileno(), raw, at)
                try:
                    at = os.lseek(source.fileno(), at + len(raw), os.SEEK_DATA)
                except OSError:  # no more
                    break


def damage(path: Path, data: bytes) -> None:
    """Eleven bytes an edit: which file, where (as a share of it), what to write there."""
    found = sorted(one for one in path.rglob("*") if one.is_file() and one.stat().st_size)
    for at in range(0, len(data) - 10, 11):
        file = found[data[at] % len(found)]
        size = file.stat().st_size
        place = int.from_bytes(data[at + 1 : at + 3], "little")
        # Half of them near the beginning, where the headers are.
        where = place % 512 if place & 1 else size * place // 65536
        edit = data[at + 3 : at + 11]
        if edit[:1] == b"\xfe":  # the file ends here
            os.truncate(file, where)
        else:
            with file.open("r+b") as opened:
                opened.seek(where // 8 * 8)
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


def one_input(data: bytes, built: Path) -> None:
    """Damage a copy and use it."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "store"
        copy(built, path)
        damage(path, data)
        use(path, "r")
        with contextlib.suppress(MillstreamError):
            inspect.verify(path)
        use(path, "rw")
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


def search(
    build: Callable[[Path], None],
    one_input: Callable[[bytes, Path], None],
    inputs: Callable[[int, int], list[bytes]],
) -> None:
    """Look for more, as many seconds as the command line says."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    with tempfile.TemporaryDirectory() as name:
        built = Path(name) / "built"
        build(built)
        try:
            import atheris
        except ImportError:
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
            return
        atheris.instrument_all()
        atheris.Setup(
            [sys.argv[0], f"-max_total_time={seconds:.0f}"], lambda data: one_input(data, built)
        )
        atheris.Fuzz()


if __name__ == "__main__":
    search(build, one_input, inputs)
