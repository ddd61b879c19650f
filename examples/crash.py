"""Kill a writer with SIGKILL in the middle of its work: nothing acknowledged is lost.

The child appends and, after each append has returned, writes the offset to a pipe. The parent kills
it at a random moment, opens the store, and compares what the child was told with what is there.

Run it: `python examples/crash.py [ROUNDS]`.
"""

import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time

import millstream

OFFSET = struct.Struct("<Q")


def write(path: str) -> None:
    """Append for ever; report each offset after its append has returned."""
    stream = millstream.open(path).stream("work")
    number = stream.next_offset(0)
    while True:
        position = stream.append(b"record %d" % number)
        os.write(1, OFFSET.pack(position.offset))
        number += 1


def kill_one(path: str, seconds: float) -> int:
    """Run a writer, kill it, and return the last offset it was told."""
    command = [sys.executable, __file__, "--write", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        told = bytearray(os.read(writer.stdout.fileno(), OFFSET.size))  # it has begun
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told += os.read(writer.stdout.fileno(), 1 << 16)
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.read()
    if not told:
        raise SystemExit("the writer ended before its first append")
    last: int = OFFSET.unpack(told[-OFFSET.size :])[0]  # writes of 8 bytes to a pipe are whole
    return last


def check(path: str, last: int) -> int:
    """Compare the log with what was acknowledged; return how many records there are."""
    with millstream.open(path) as store:
        stream = store.stream("work")
        offset = 0
        for batch in stream.read():
            for value in batch.values:
                if value != b"record %d" % offset:
                    raise SystemExit(f"LOST: at offset {offset} there is {value!r}")
                offset += 1
        if offset <= last:
            raise SystemExit(f"LOST: offset {last} was acknowledged, the log ends before {offset}")
        return offset


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        write(sys.argv[2])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chance = random.Random()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1, rounds + 1):
            last = kill_one(scratch, chance.uniform(0.01, 0.15))
            count = check(scratch, last)
            print(f"kill {number}: acknowledged up to offset {last:,}, found {count:,} records")
    print("nothing acknowledged was lost")


if __name__ == "__main__":
    main()
