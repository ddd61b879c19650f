"""The state of a store in trouble can be seen, without a descriptor too."""

import subprocess
import sys
from pathlib import Path

import millstream
from millstream.disk import files

LOOK = """
import sys
import every_call
import millstream

store = millstream.open(sys.argv[1], durability="interval")
options = {"segment_bytes": 1 << 16, "compact": millstream.Compaction(min_age=0)}
stream, queue = store.stream("s", partitions=2, **options), store.queue("q")
stream.append_many([b"1"] * 100, keys=[b"k"] * 100, partition=1)
for _ in range(5):
    stream.append(bytes(30_000), key=b"k", partition=1)
stream.compact()


def told(stats):  # what the background does not change meanwhile
    parts = [(part.next_offset, part.segments, part.dirty) for part in stats.partitions]
    return stats.health, stats.records, stats.log_bytes, stats.producers, parts


before = told(stream.stats())
queue.put(b"1")
consumer = stream.consumer(group="g", timeout=0)
consumer.poll(0)
consumer.commit()
group = stream.group("g")
for _ in range(2):  # the first one imports what it needs
    with every_call.no_descriptors():
        ours, theirs, health = stream.stats(), queue.stats(), group.health
    assert (ours.health, theirs.health, health) == ("sound", "sound", "sound")
    assert told(ours) == before and ours.records < 50 and ours.allocated_bytes
    assert theirs.ready == 1
store.close()

store = millstream.open(sys.argv[1])
stream = store.stream("s")
with every_call.no_descriptors():
    ours = stream.stats()  # nothing is mapped, and nothing of it can be
assert told(ours) == told(stream.stats()) == before
store.close()
"""


def test_stats_say_without_a_descriptor_how_things_are(tmp_path):
    command = [sys.executable, "-c", LOOK, tmp_path / "store"]
    here = Path(__file__).parent
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=here
    )
    assert ended.returncode == 0, ended.stderr


def test_group_whose_positions_could_not_be_synced_says_so_to_all(tmp_path, monkeypatch):
    def refuse(descriptor, path):
        raise files.storage_error(OSError(5, "it broke"), path, "syncing")

    with millstream.open(tmp_path / "store", durability="sync") as store:
        stream = store.stream("s")
        stream.append(b"1")
        with stream.consumer(group="g", timeout=0) as consumer:
            assert stream.group("g").health == "sound"
            consumer.poll(0)
            with monkeypatch.context() as patched:
                patched.setattr(files, "sync", refuse)
                try:
                    consumer.commit()
                except millstream.Indeterminate:
                    pass
                else:
                    raise AssertionError("it was to fail")
            assert stream.group("g").health == "sync failed"
            with millstream.open(tmp_path / "store", mode="r") as reader:
                assert reader.stream("s").group("g").health == "sync failed"
