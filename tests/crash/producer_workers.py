"""The processes of test_producer_kills.py: producers that are killed, and go on from what is there.

What a producer sends is a function of its id and the sequence alone, so that every copy is the same
and the judge knows what to expect. A file a worker says what was acknowledged.
"""

import os
import random
import time

from crash_workers import ended

import millstream

KEYS = 7
PAUSE_S = 0.001  # so that the judge has thousands of records to read, not millions


def value(name: str, sequence: int) -> bytes:
    return b"%s:%d " % (name.encode(), sequence) + b"v" * (sequence * 37 % 400)


def key(sequence: int) -> bytes | None:
    return None if sequence % 5 == 0 else b"k%d" % (sequence % KEYS)


def send_for_ever(path: str, name: str, acknowledged: str, seed: int) -> None:
    """Send what comes behind `last_sequence`, or begin again far before it."""
    dice = random.Random(seed)
    descriptor = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", partitions=2, segment_bytes=1 << 16)
        producer = stream.producer(id=name)
        print("open", flush=True)
        last = producer.last_sequence
        sequence = last + 1 if dice.random() < 0.5 else max(0, last - dice.randrange(400))
        while not ended():
            count = dice.choice((1, 1, 1, 4, 40))
            if count == 1:
                producer.append(value(name, sequence), sequence=sequence, key=key(sequence))
            else:
                some = range(sequence, sequence + count)
                producer.append_many(
                    [value(name, n) for n in some],
                    keys=[key(n) for n in some],
                    first_sequence=sequence,
                )
            sequence += count
            os.write(descriptor, b"%d\n" % (sequence - 1))
            if dice.random() < 0.02:
                stream.append(b"plain:0 ", key=b"k0")
            time.sleep(PAUSE_S)  # so that kills come at each place, not in one long append


def register_for_ever(path: str, seed: int) -> None:
    """Register ids that others register too, and send one record with each, once."""
    dice = random.Random(seed)
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        print("open", flush=True)
        while not ended():
            name = f"id-{int(dice.random() ** 3 * 200_000)}"  # some often, some seldom
            stream.producer(name).append(name.encode(), sequence=0)
