"""Writes the corpora of the fuzz harnesses: `python tests/fuzz/corpora.py DIRECTORY`.

Every byte follows from this file: seeds are files as docs/format.md says, in the pieces that
fuzz.h reads, whole and damaged, and what a fuzzer has found (`FOUND`).
"""

import random
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))

from queue_builder import ACKING, DEAD, DELAYED, HELD, LEASED, PREPARED, WRITING, QueueBuilder, word
from store_builder import StoreBuilder

FOUND: dict[str, list[str]] = {"segment": [], "control": [], "group": [], "queue": [], "arrow": []}
"""By harness: inputs in hex that once failed."""
UNIT = 64


def pieces(file: bytes) -> bytes:
    """What is not zero in a file, as fuzz.h reads it."""
    found = b""
    at = 0
    while at < len(file):
        end = at
        while end < len(file) and end - at < 65472 and any(file[end : end + UNIT]):
            end += UNIT
        if end > at:
            raw = file[at:end]
            found += struct.pack("<HH", at // UNIT, len(raw)) + raw
        at = max(end, at + UNIT)
    return found


def damaged(seed: bytes, count: int, salt: int) -> list[bytes]:
    """Copies in which bits and numbers differ."""
    source = random.Random(salt)
    found = []
    for _ in range(count):
        raw = bytearray(seed)
        for _ in range(source.randint(1, 4)):
            at = source.randrange(5, len(raw) - 8)
            if source.random() < 0.5:
                raw[at] ^= 1 << source.randrange(8)
            else:
                number = source.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
                raw[at : at + 8] = struct.pack("<Q", number)
        found.append(bytes(raw))
    return found


def segments() -> list[bytes]:
    """Batches of every kind: columns, fillers, a successor."""
    log = StoreBuilder(Path("nowhere")).stream("s").log(0)
    log.append([b"a", b"b"])
    log.append([b"a", None, b"ccc"], keys=[b"k", None, b"l"])
    log.append([b"x"] * 5, keys=[b"k"] * 5, timestamps=[5, 1, 3, 2, 4])
    log.append([b"h", b"i"], headers=[[("n", b"v"), ("m", b"")], []])
    log.append([b"big" * 3000])
    return [bytes(log.segment.data)]


def controls() -> list[bytes]:
    """The control page of a stream, and two segments: a spare, a finished roll, a dead writer's."""
    found = []
    for activated, control in (
        (False, {}),
        (True, {}),
        (False, {"hint_tail": 8, "append": 5 | 9 << 15}),
        (False, {"tail": 40000, "hint_tail": 40000}),
        (False, {"tail": 2**40, "hint_tail": 2**40, "durable": 2**40}),
        (False, {"tail": 1 << 17, "hint_tail": 1 << 17, "active": 9}),
        (False, {"tail": 2**64 - 8, "hint_tail": 2**64 - 8, "hint_offset": 2**64 - 1}),
        (False, {"tail": 40000}),
        (False, {"tail": 60000, "append": 5 | 9 << 15}),
        (False, {"hint_offset": 2**63, "active": 0}),
    ):
        log = StoreBuilder(Path("nowhere")).stream("s").log(0)
        log.roll(base_position=1 << 16)
        log.append([b"a", b"b"], keys=[b"k", None])
        log.append([b"x" * 3000], producer=1, sequence=5)
        log.roll()  # which its owner did not get to name
        log.control = {"active": 1, **control}
        spare = log.segment.data
        if not activated:
            spare[4096:4168] = bytes(72)
        page = log.stream.control_bytes().ljust(8192, b"\0")
        found.append(page + bytes(log.segments[0].data) + bytes(spare))
    return found


def groups() -> list[bytes]:
    """Partitions with positions, one with a transaction's mark; a member of another session."""
    header = struct.pack("<8sII16sQQQQ", b"MSGROUP1", 1, 256, bytes(16), 7, 99, 5, 0)
    header += struct.pack("<IIQIIQ", 1, 0, 3, 8, 0, 0)
    member = struct.pack("<IIQQq", 1 | 9 << 15, 1, 2**40, 2**40, 1_700_000_000_000_000)
    file = bytearray(4096 + 64 * 256 + 192 * 16)
    file[: len(header)] = header
    file[4096 : 4096 + len(member)] = member
    for partition in range(8):
        pending = (4 << 40 | 1, 2, 30, 3 << 24 | 1) if partition == 3 else (0, 0, 0, 0)
        raw = struct.pack("<QII4Q16x", 3 << 24 | partition, 1, 0, *pending)
        for copy in range(2):
            raw += struct.pack("<QQQQQ24x", 0, copy + 1, 2, 10 * copy, 0)
        at = 4096 + 64 * 256 + 192 * partition
        file[at : at + len(raw)] = raw
    return [bytes(file)]


def queues() -> list[bytes]:
    """Messages in every state, with contents in blocks, keys, headers, failures, dedup ids."""
    queue = QueueBuilder(StoreBuilder(Path("nowhere")), capacity=40, dead_limit=6)
    for state in (DELAYED, LEASED, HELD, DEAD, PREPARED, ACKING):
        queue.put(b"state %d" % state, key=b"k", state=state, attempts=1)
    for lane in range(3):
        queue.put(b"lane", lane=lane, headers=[("name", b"value")])
    queue.put(b"large" * 2000)
    queue.put(b"late", state=DELAYED, due=1_700_000_001_000_000)
    queue.put(b"old", expires=1_600_000_000_000_000)
    queue.set_word(queue.next_slot, word(WRITING, tick=1 | 7 << 15))
    dedup = struct.pack("<8sII16sQQI", b"MSQDEDU1", 1, 2, bytes(16), 0, 0, 0)
    slots = bytes(queue.slots).ljust(-(-len(queue.slots) // 4096) * 4096, b"\0")
    blocks = bytes(queue.blocks).ljust(-(-len(queue.blocks) // 4096) * 4096, b"\0")
    return [slots + blocks + dedup.ljust(64, b"\0")]


def arrows() -> list[bytes]:
    """Columns as fuzz_arrow.c makes them, by its list of formats: one alone, or a table of three.

    A column: format, name, what is odd, elements, offset, nulls; for views how many buffers; which
    buffers there are; then each buffer, behind a byte that says where it lies.
    """
    value, key, timestamp = 0, 3, 4
    offsets = {
        "z": struct.pack("<12i", *range(0, 36, 3)),
        "Z": struct.pack("<12q", *range(0, 36, 3)),
    }
    text, bits = b"\x01" + b"\x24" * 36, b"\x01\xff\xfd"

    def strings(index: int, name: int, how: str, flags: int = 0x4F) -> bytes:
        raw = bytes([index, name, 0, 11, 1, 0, flags])
        if flags & 1:
            raw += bits
        return raw + b"\x01" + offsets[how] + b"\x24" + text

    def views(index: int, name: int) -> bytes:
        short = struct.pack("<i12s", 5, b"short")
        long = struct.pack("<i4sii", 20, b"long", 1, 3)
        rows = b"\x01" + (short + long) * 5 + short
        return bytes([index, name, 0, 11, 0, 1, 2, 0x4E]) + rows + b"\x0a\x01" + bytes(10) + bytes(
            [0, 40, 1]
        ) + bytes(40) + b"\0\x01"  # fmt: skip

    def fixed(index: int, name: int, width: int, odd: int = 0) -> bytes:
        rows = bytes(range(1, 11)) * width
        return bytes([index, name, odd, 10, 1, 1, 0x4F]) + bits + b"\x01" + rows

    columns = [strings(i, value, how) for i, how in ((1, "z"), (2, "z"), (3, "Z"), (4, "Z"))]
    columns += [strings(1, value, "z", 0x46), views(5, value), views(6, value)]
    columns += [fixed(i, value, 8) for i in range(50)] + [
        fixed(13, value, 8, 1 << i) for i in range(8)
    ]
    column_k, column_t = strings(1, key, "z"), fixed(24, timestamp, 8)
    found = []
    for column in columns:
        found.append(bytes([0, 1, 5]) + column + column_k + column_t)
        found.append(bytes([1, 0, 5]) + column + column_k + column_t + b"\x01\xff\xff\xff")
    return found


def corpora() -> dict[str, list[bytes]]:
    """By harness: its inputs."""
    found = {}
    for name, files, flags in (
        ("segment", segments(), (0, 1, 3, 7, 15)),
        ("control", controls(), (0, 3, 15)),
        ("group", groups(), (0, 1, 3)),
        ("queue", queues(), (0, 1, 3, 4, 7, 8, 31)),
    ):
        seeds = [bytes([flag]) + pieces(file) for file in files for flag in flags]
        more = [one for i, seed in enumerate(seeds) for one in damaged(seed, 40, i)]
        found[name] = seeds + more + [bytes.fromhex(text) for text in FOUND[name]]
    seeds = arrows()
    more = [one for i, seed in enumerate(seeds) for one in damaged(seed, 20, i)]
    found["arrow"] = seeds + more + [bytes.fromhex(text) for text in FOUND["arrow"]]
    return found


def write(directory: Path) -> None:
    """One file an input, in a directory for each harness."""
    for name, inputs in corpora().items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        for number, raw in enumerate(inputs):
            (directory / name / f"{number:04}").write_bytes(raw)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
