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

FOUND: dict[str, list[str]] = {"segment": [], "group": [], "queue": []}
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


def corpora() -> dict[str, list[bytes]]:
    """By harness: its inputs."""
    found = {}
    for name, files, flags in (
        ("segment", segments(), (0, 1, 3, 7, 15)),
        ("group", groups(), (0, 1, 3)),
        ("queue", queues(), (0, 1, 3, 4, 7, 8, 31)),
    ):
        seeds = [bytes([flag]) + pieces(file) for file in files for flag in flags]
        more = [one for i, seed in enumerate(seeds) for one in damaged(seed, 40, i)]
        found[name] = seeds + more + [bytes.fromhex(text) for text in FOUND[name]]
    return found


def write(directory: Path) -> None:
    """One file an input, in a directory for each harness."""
    for name, inputs in corpora().items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        for number, raw in enumerate(inputs):
            (directory / name / f"{number:04}").write_bytes(raw)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
