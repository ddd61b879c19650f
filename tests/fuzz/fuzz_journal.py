"""A store whose journal says anything, replayed by an opener: whole batches, wrong transactions.

`python tests/fuzz/fuzz_journal.py [SECONDS]` looks for more, with atheris where that is installed.
The suite replays a few hundred inputs (tests/unit/test_fuzz.py). Only errors of millstream are
allowed, and what was stored before is there after each.
"""

import contextlib
import json
import random
import struct
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz import fuzz_store
from store_builder import StoreBuilder, json_bytes, put

import millstream
from millstream import MillstreamError, inspect
from millstream.disk import files

FOUND: list[bytes] = [
    b"\0\xff", b"\0\xff[", b"\0\xff" + b"[" * 40_000, b"\0\xffnull",
    b"\0\x0f\0\x08",  # the slot of an acknowledged message is none of the queue
]  # fmt: skip
"""Inputs that once failed."""
JOURNAL = Path("streams/@journal")
SEGMENT = JOURNAL / "00000/0000000000000001.seg"
ODD = (
    None, True, -1, 0, 1, 2, 7, 40, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64, -(2**63),
    1.5, 1e308, "", "x", "../..", "s", "q", "g", "\ud800", [], [[]], [0, 1], {}, 10**400,
)  # fmt: skip
"""What a number, a name or a list of a manifest becomes."""


def build(path: Path) -> None:
    """A store with a journal, as a killed process leaves it; `rows` beside it is what it says."""
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", partitions=2, segment_bytes=1 << 20)
        stream.append_many([b"%d" % i for i in range(20)], keys=[b"k%d" % i for i in range(20)])
        queue = store.queue("q", capacity=64, codec=None, dedup_window=3600.0)
        queue.put_many([b"first", b"second"])
        with stream.consumer("g", start="earliest") as consumer, store.transaction() as transaction:
            transaction.ack(queue.get(timeout=0))
            transaction.append(stream, b"x", key=b"k1", headers={"n": b"v"})
            transaction.append(stream, b"y", key=b"k2")
            transaction.put(queue, b"z", dedup_id="once")
            consumer.poll(1.0)
            transaction.commit(consumer)
        rows = []
        journal = store._transactions.journal()
        for batch in journal.stream.read(partition=0):
            headers = [list((one or {}).items()) for one in batch.headers]
            rows += zip(batch.values, batch.keys, headers, strict=True)
    body = files.read_json(path / "store.json")
    put(path / "store.json", json_bytes({**body, "clean": False}))
    told = [[bytes(v).hex(), None if k is None else bytes(k).hex(),
             [[n, bytes(x).hex()] for n, x in h]] for v, k, h in rows]  # fmt: skip
    path.with_name("rows").write_text(json.dumps(told))


def places_of(manifest: object) -> list[tuple[object, object]]:
    """Each list in it, with each index."""
    found, left = [], [manifest]
    while left:
        one = left.pop()
        found += [(one, i) for i in range(len(one))]
        left += [item for item in one if isinstance(item, list)]
    return found


def manifest_of(data: bytes, good: bytes) -> bytes:
    """Three bytes an edit of the good one: where, what; or, behind a 255, all of it."""
    if data[:1] == b"\xff":
        return data[1:]
    manifest = json.loads(good)
    for at in range(0, len(data) - 2, 3):
        found = places_of(manifest)
        if not found:
            break
        holder, index = found[int.from_bytes(data[at : at + 2], "little") % len(found)]
        what, before = data[at + 2], holder[index]
        if type(before) is int and what >= 192:  # a bit of it
            holder[index] = before ^ 1 << what % 64
        elif type(before) is int and what >= 64:
            holder[index] = what % 64
        elif what == 0:
            del holder[index]
        else:
            holder[index] = json.loads(json.dumps(ODD[what % len(ODD)]))
    return json.dumps(manifest).encode()


def write_journal(path: Path, data: bytes) -> None:
    """The log of the journal, with hashes that are right, and the page; the first byte says how."""
    told = json.loads(path.with_name("rows").read_text())
    values = [bytes.fromhex(value) for value, _, _ in told]
    keys = [None if key is None else bytes.fromhex(key) for _, key, _ in told]
    headers = [[(name, bytes.fromhex(one)) for name, one in row] for _, _, row in told]
    flags, data = data[0] if data else 0, data[1:]
    if flags & 1:  # where the page says that it is to be begun
        with (path / JOURNAL / "page").open("r+b") as page:
            page.seek(80)
            page.write(struct.pack("<Q", flags >> 4))
    if flags & 2:  # a good one before it
        good = [(values[i], keys[i], headers[i]) for i in range(len(values))]
    else:
        good = []
    values[0] = manifest_of(data, values[0])
    if flags & 4:
        del values[-1], keys[-1], headers[-1]
    if flags & 8:
        values[-1] = None
    body = files.read_json(path / JOURNAL / "stream.json")
    store = files.read_json(path / "store.json")
    builder = StoreBuilder(path, generation=store["generation"])
    builder.store_id = bytes.fromhex(store["store_id"])
    stream = builder.stream("@journal")
    stream.stream_id = int(body["stream_id"], 16)
    log = stream.log(0)
    if good:
        log.append([r[0] for r in good], keys=[r[1] for r in good], headers=[r[2] for r in good])
    log.append(values, keys=keys, headers=headers)
    (path / SEGMENT).write_bytes(bytes(log.segment.data))


def one_input(data: bytes, built: Path) -> None:
    """Give a copy this journal and open it."""
    with tempfile.TemporaryDirectory(dir=fuzz_store.MEMORY) as name:
        path = Path(name) / "store"
        fuzz_store.copy(built, path)
        path.with_name("rows").write_bytes(built.with_name("rows").read_bytes())
        write_journal(path, data)
        for mode in ("r", "rw"):
            with contextlib.suppress(MillstreamError), millstream.open(path, mode=mode) as store:
                with contextlib.suppress(MillstreamError):
                    store.queue("q").peek(10)
                found = [bytes(v) for batch in store.stream("s").read() for v in batch.values]
                assert set(found) >= {b"%d" % i for i in range(20)}, found
        fuzz_store.check_nothing_runs()
        with contextlib.suppress(MillstreamError):
            inspect.verify(path)


def inputs(count: int, seed: int) -> list[bytes]:
    """Random edits."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        flags = source.choice([0, 0, 0, 1, 2, 4, 8, source.randrange(256)])
        data = bytes([flags])
        for _ in range(source.choice([1, 1, 2, 3])):
            data += source.randbytes(3)
        found.append(data)
    return found


if __name__ == "__main__":
    fuzz_store.search(build, one_input, inputs, FOUND)
