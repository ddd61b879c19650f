"""Makes the golden stores: `python tests/golden/make.py DIRECTORY`.

Each store is a NAME.tar.xz. Beside a good one NAME.json says what was written into it; what is to
become of a damaged one says tests/unit/test_golden.py. Those in this directory were made once, by
millstream 0.1.0 in format 1, and are never made anew: every later version must read them. A new
kind of store gets a new name. The script reaches into that version where it has to stop halfway.
"""

import io
import json
import os
import shutil
import struct
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import xxhash

import millstream
from millstream import inspect
from millstream.transactions import journal

BEGIN = 1_700_000_000_000_000
FUTURE = 4_102_444_800_000_000  # 2100: not yet
SEGMENT = 1 << 16


def brief(value):
    """Bytes as JSON has them: the text, or length and hash of a long one."""
    if value is None:
        return None
    value = bytes(value)
    if len(value) <= 40:
        return value.decode("latin-1")
    return f"{len(value)} bytes, {xxhash.xxh3_64_hexdigest(value)}"


def rows(stream, **options):
    """Records as `Told.note` takes them."""
    return [
        (batch.partition, batch.epoch, *row)
        for batch in stream.read(**options)
        for row in zip(batch.offsets.tolist(), batch.timestamps.tolist(), batch.keys,
                       batch.values, batch.headers, strict=True)
    ]  # fmt: skip


class Told:
    """What was written, to be compared with what is read."""

    def __init__(self):
        self.streams, self.groups, self.producers, self.queues, self.views = {}, {}, {}, {}, {}

    def append(self, stream, values, *, keys=None, headers=None, begin=None, **options):
        """Append, and note where the records went."""
        known = self.streams.setdefault(stream.name, [])
        begin = BEGIN + len(known) * 1000 if begin is None else begin
        keys = [None] * len(values) if keys is None else keys
        if len(values) == 1:
            at = stream.append(values[0], key=keys[0], headers=headers, timestamp=begin, **options)
            self.note(stream.name, at.partition, at.epoch, at.offset, begin, keys[0], values[0],
                      headers)  # fmt: skip
            return at
        stamps = [begin + 7 * i for i in range(len(values))]
        spans = stream.append_many(values, keys=keys, headers=headers, timestamps=stamps, **options)
        if len(spans) == 1:
            (span,) = spans
            for i, value in enumerate(values):
                self.note(stream.name, span.partition, span.epoch, span.first_offset + i,
                          stamps[i], keys[i], value, headers)  # fmt: skip
        else:  # by key: each span has its records in their order
            for span in spans:
                for row in rows(stream, partition=span.partition, start=span.first_offset):
                    self.note(stream.name, *row)
        return spans

    def note(self, name, partition, epoch, offset, timestamp, key, value, headers):
        row = [partition, epoch, offset, timestamp, brief(key), brief(value),
               {name: brief(one) for name, one in (headers or {}).items()}]  # fmt: skip
        self.streams.setdefault(name, []).append(row)

    def message(self, queue, id, state, value, *, key=None, headers=None, priority=0, attempts=0):
        self.queues.setdefault(queue.name, {"messages": [], "dead": [], "paused": False})
        self.queues[queue.name]["messages"].append(
            [id, state, priority, brief(key),
             {name: brief(one) for name, one in (headers or {}).items()}, brief(value),
             attempts])  # fmt: skip
        return id

    def dead(self, queue, id, reason, first, last, attempts, value):
        self.queues.setdefault(queue.name, {"messages": [], "dead": [], "paused": False})
        self.queues[queue.name]["dead"].append([id, reason, first, last, attempts, brief(value)])

    def gone(self, name, keep):
        """Leave out the records that are not kept any more."""
        self.streams[name] = [row for row in self.streams[name] if keep(row)]

    def json(self):
        for rows in self.streams.values():
            rows.sort(key=lambda row: (row[0], row[2]))
        for queue in self.queues.values():
            queue["messages"].sort()
            queue["dead"].sort()
        lines = []
        for part, things in vars(self).items():
            for name, what in things.items():
                if isinstance(what, list):
                    text = ",\n".join(f"  {json.dumps(row)}" for row in what)
                    lines.append((part, f'"{name}": [\n{text}]'))
                else:
                    lines.append((part, f'"{name}": {json.dumps(what)}'))
        parts = []
        for part in vars(self):
            text = ",\n".join(line for of, line in lines if of == part)
            parts.append(f'"{part}": {{{text}}}')
        return "{" + ",\n".join(parts) + "}\n"


@contextmanager
def opened(path, **options):
    with millstream.open(path, durability="process", **options) as store:
        yield store


def copy(source, target):
    """What the death of every process leaves of an open store."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


# good -------------------------------------------------------------------------------------------


def streams(path, told):
    """All shapes of batches; rolls; three generations; retention; partitions added later."""
    live = path.with_name("live")
    with opened(live) as store:
        s = store.stream("shapes", partitions=2, segment_bytes=SEGMENT)
        told.append(s, [b"one"], partition=0)
        told.append(s, [b""], partition=0)
        told.append(s, [b"with a key"], keys=[b"k"], begin=BEGIN + 5)
        told.append(s, [None], keys=[b"k"])
        told.append(s, [b"with headers"], headers={"trace": b"\x00\x01", "empty": b""}, partition=1)
        told.append(s, [b"same", b"size", b"each"], partition=1)
        told.append(s, [b"of", b"any", b"", None, b"size"], partition=0)
        told.append(s, [b"a", b"b", b"c", b"d"], keys=[b"1", b"2", None, b"1"], partition=1)
        told.append(s, [b"%d" % i for i in range(6)], keys=[b"%d" % i for i in range(6)])
        told.append(s, [b"many, and headers"] * 3, headers={"h": b"v" * 50}, partition=0)
        told.append(s, [b"aligned" * 900], partition=0)
        for i in range(40):  # rolls twice
            told.append(s, [b"%d " % i * 900], partition=1)
        copy(live, path)
    shutil.rmtree(live)
    with opened(path) as store:  # the second generation, after a kill
        s = store.stream("shapes")
        told.append(s, [b"after a kill"], partition=0)
        told.append(s, [b"after a kill"] * 2, partition=1)
        store.stream("empty", partitions=3)
        told.streams["empty"] = []
        grown = store.stream("grown")
        told.append(grown, [b"before", b"too"], keys=[b"k1", b"k2"])
        grown.add_partitions(2)
        told.append(grown, [b"%d" % i for i in range(5)], keys=[b"k%d" % i for i in range(5)])
        short = store.stream("retired", segment_bytes=SEGMENT)
        for i in range(30):
            told.append(short, [b"%03d" % i * 3000])
        first = short.delete_before(millstream.Position(0, 2, 20))
        assert 0 < first <= 20
        told.gone("retired", lambda row: row[2] >= first)
        keep = millstream.Retention(records=1000, age="3650d")
        synced = store.stream("synced", durability="sync", retention=keep)
        told.append(synced, [b"survives a power cut"])


def compacted(path, told):
    """Compacted segments, tombstones, a snapshot of a view."""
    with opened(path) as store:
        compact = millstream.Compaction(min_age="0s", tombstone_age="3650d")
        s = store.stream("prices", partitions=2, segment_bytes=SEGMENT, compact=compact)
        for i in range(60):
            told.append(s, [b"%d EUR" % i * 500], keys=[b"article-%d" % (i % 7)])
        told.append(s, [None], keys=[b"article-3"])
        for i in range(60, 90):
            told.append(s, [b"%d EUR" % i * 500], keys=[b"article-%d" % (i % 2)])
        result = s.compact()
        assert result.records_removed > 20
        left = {(row[0], row[2]) for row in rows(s)}
        newest = {}
        for row in told.streams["prices"]:
            newest[row[4]] = row
        assert all((row[0], row[2]) in left for row in newest.values())
        told.gone("prices", lambda row: (row[0], row[2]) in left)
        told.views["prices"] = {k: row[5] for k, row in newest.items() if row[5] is not None}
        with s.view() as view:
            assert {brief(k): brief(v) for k, v in view.items()} == told.views["prices"]


def producers(path, told):
    """Producers of two streams, whose segments rolled; one appended without any."""
    with opened(path) as store:
        s = store.stream("orders", partitions=2, segment_bytes=SEGMENT)
        a, b = s.producer("ingest-a"), s.producer("ingest-\N{GREEK SMALL LETTER BETA}")
        for i in range(1, 25):
            at = a.append(b"%d" % i * 2000, sequence=i * 10, timestamp=BEGIN + i)
            told.note("orders", at.partition, at.epoch, at.offset, BEGIN + i, None,
                      b"%d" % i * 2000, {})  # fmt: skip
        many = [b"%d" % i for i in range(8)]
        for span in b.append_many(many, keys=many, first_sequence=5, timestamps=BEGIN + 99):
            for row in rows(s, partition=span.partition, start=span.first_offset):
                told.note("orders", *row)
        s.producer("never used")
        told.append(s, [b"of no producer"], partition=0, begin=BEGIN + 200)
        told.producers["orders"] = {one.id: list(one.last_sequences) for one in (a, b)}


def queues(path, told):
    """Every state that a message may rest in; contents in slots and blocks."""
    with opened(path) as store:
        q = store.queue("mail", capacity=200, priorities=3, payload_bytes=SEGMENT, dead_limit=8,
                        retry=millstream.RetryPolicy(max_attempts=2, backoff=0.0))  # fmt: skip
        for i in range(3):
            q.put(b"poor %d" % i * (1 + 2000 * (i == 2)))
        rejected, *failing = q.get_many(3, timeout=0)
        why = "no such address"
        told.dead(q, rejected.id, why, why, why, 1, rejected.value)
        rejected.reject(why)
        for m in failing:
            told.dead(q, m.id, "failed", "first try", "gave up", 2, m.value)
            m.nack(0, "first try")
            q.get(timeout=60).nack(0, "gave up")
        q.put(b"done")
        q.get(timeout=60).ack()
        for i in range(6):
            told.message(q, q.put(b"ready %d" % i, priority=i % 3), "ready", b"ready %d" % i,
                         priority=i % 3)  # fmt: skip
        more = {"key": b"k", "headers": {"trace": b"\x00\xff"}}
        told.message(q, q.put(b"", **more), "ready", b"", **more)
        for size in (300, 5000, 20_000):  # in blocks
            told.message(q, q.put(b"L" * size), "ready", b"L" * size)
        told.message(q, q.put(b"later", at=FUTURE), "delayed", b"later")
        told.message(q, q.put(b"lasts", ttl=3e9), "ready", b"lasts")
        q = store.queue("ordered", ordering="key", capacity=100, payload_bytes=SEGMENT)
        for i in range(6):
            key = b"k%d" % (i % 2)
            told.message(q, q.put(b"%d" % i, key=key), "ready" if i < 2 else "held", b"%d" % i,
                         key=key)  # fmt: skip
        q = store.queue("once", dedup_window=3e9, capacity=100, payload_bytes=SEGMENT)
        q.put(b"over", dedup_id="another")
        q.get(timeout=60).ack()
        told.message(q, q.put(b"first", dedup_id="the id"), "ready", b"first")
        q = store.queue("paused", capacity=10, durability="sync", payload_bytes=SEGMENT)
        told.message(q, q.put(b"waits"), "ready", b"waits")
        q.pause()
        told.queues["paused"]["paused"] = True
        store.queue("unused", capacity=10, payload_bytes=SEGMENT)
        told.queues["unused"] = {"messages": [], "dead": [], "paused": False}


def groups(path, told):
    """Two groups of one stream, at different positions; one that has none yet."""
    with opened(path) as store:
        s = store.stream("clicks", partitions=3)
        for i in range(30):
            told.append(s, [b"%d" % i], partition=i % 3)
        store.stream("quiet")
        told.streams["quiet"] = []
        found = told.groups["clicks"] = {}
        with s.consumer(group="half", max_records=5) as consumer:
            positions = {0: None, 1: None, 2: None}
            while (batch := consumer.poll(0)) is not None:
                if batch.partition < 2 and batch.next_offset <= 5:
                    consumer.commit(batch)
                    positions[batch.partition] = [1, batch.next_offset]
            found["half"] = list(positions.values())
        with s.consumer(group="all", auto_commit=True, timeout=0) as consumer:
            for _ in consumer:
                pass
        found["all"] = [[1, 10]] * 3
        with s.consumer(group="new"):
            pass
        found["new"] = [None] * 3


def transacted(path, told, tail=None):
    """A journal whose transactions are done; `tail(store, ...)` goes on with more of them."""
    live = path.with_name("live")
    with opened(live) as store:
        orders, paid = store.stream("orders"), store.stream("paid", partitions=2)
        jobs = store.queue("jobs", capacity=50, dedup_window=3e9, payload_bytes=SEGMENT)
        for i in range(9):
            told.append(orders, [b"order %d" % i])
        consumer = orders.consumer("billing", delivery="exactly_once", max_records=3)
        for step in range(2):
            batch = consumer.poll(0)
            move(store, consumer, batch, paid, jobs, told, BEGIN + 100 * step)
        told.groups["orders"] = {"billing": [[1, 6]]}
        (m,) = jobs.get_many(1, timeout=0)
        with store.transaction() as tx:
            tx.ack(m)
            tx.append(paid, b"acknowledged", partition=0, timestamp=BEGIN + 500)
        told.note("paid", *rows(paid, partition=0)[-1])
        told.queues["jobs"]["messages"] = [
            row for row in told.queues["jobs"]["messages"] if row[0] != m.id
        ]
        if tail is None:
            consumer.close()
        else:
            tail(store, consumer, paid, jobs, told, live, path)
    if tail is None:
        shutil.move(live, path)
    shutil.rmtree(live, ignore_errors=True)


def move(store, consumer, batch, paid, jobs, told, begin):
    """One transaction: records to `paid`, messages to `jobs`, the position."""
    before = rows(paid)
    known = {m.id for m in jobs.peek(100)}
    with store.transaction() as tx:
        tx.commit(consumer)
        for i, value in enumerate(batch.values):
            tx.append(paid, value, partition=i % 2, timestamp=begin + i, headers={"n": b"%d" % i})
            tx.put(jobs, value * (1 + 1000 * (i == 2)), dedup_id=bytes(value))
    for row in rows(paid):
        if row not in before:
            told.note("paid", *row)
    for m in jobs.peek(100):
        if m.id not in known:
            told.message(jobs, m.id, "ready", m.value)


def transactions(path, told):
    transacted(path, told)


def recorded(path, told):
    """Killed behind the commit: the journal says more than was done. The next open does it."""

    def tail(store, consumer, paid, jobs, told, live, path):
        apply_own = journal.Journal.apply_own

        def killed_here(self, offset, end, effects):
            copy(live, path)
            apply_own(self, offset, end, effects)

        journal.Journal.apply_own = killed_here
        try:
            move(store, consumer, consumer.poll(0), paid, jobs, told, BEGIN + 900)
        finally:
            journal.Journal.apply_own = apply_own
        for row in told.streams["paid"]:
            row[1] += row[3] >= BEGIN + 900  # applied in the generation of who opens it
        told.groups["orders"] = {"billing": [[1, 9]]}
        consumer.close()

    transacted(path, told, tail)


def undecided(path, told):
    """Killed before the commit: prepared, and not in the journal. The next open withdraws it."""

    def tail(store, consumer, paid, jobs, told, live, path):
        append = journal.Journal.append

        def killed_here(self, effects, *, wait):
            copy(live, path)
            return append(self, effects, wait=wait)

        (m,) = jobs.get_many(1, timeout=0)
        batch = consumer.poll(0)
        journal.Journal.append = killed_here
        try:
            with store.transaction() as tx:
                tx.commit(consumer)
                tx.ack(m)
                tx.put(jobs, b"never")
                tx.append(paid, bytes(batch.values[0]), partition=0)
        finally:
            journal.Journal.append = append
        for row in told.queues["jobs"]["messages"]:
            if row[0] == m.id:
                row[-1] = 1  # the lease that ended with its holder
        consumer.close()

    transacted(path, told, tail)


def killed(path, told):
    """An open store: leases, a member of a group, a hand on nothing; never closed."""
    live = path.with_name("live")
    with opened(live) as store:
        s = store.stream("log", segment_bytes=SEGMENT)
        for i in range(12):
            told.append(s, [b"%d" % i * 4000])
        q = store.queue("work", capacity=50, payload_bytes=SEGMENT)
        for i in range(4):
            told.message(q, q.put(b"job %d" % i), "ready", b"job %d" % i, attempts=int(i < 2))
        taken = q.get_many(2, timeout=0)
        consumer = s.consumer(group="g", max_records=3)
        consumer.commit(consumer.poll(0))
        told.groups["log"] = {"g": [[1, 3]]}
        copy(live, path)
        for m in taken:
            m.release()
        consumer.close()
    shutil.rmtree(live)


GOOD = (streams, compacted, producers, queues, groups, transactions, recorded, undecided, killed)


# damaged ----------------------------------------------------------------------------------------


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def poke(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def batch_at(path, stream, partition, number):
    return list(inspect.batches(path, stream, partition))[number]


def place(path, batch):
    return path / "streams" / batch.stream / f"{batch.partition:05}" / f"{batch.segment:016}.seg"


def slot_at(path, queue, text):
    """The slot of a message, and where it lies in the file `slots`."""
    (found,) = [m for m in inspect.messages(path, queue) if m.payload.startswith(text)]
    size = json.loads((path / "queues" / queue / "queue.json").read_text())["body"]["slot_bytes"]
    return found, 4096 + 8 * 1024 + found.slot * size


def plain(path):
    """The store that most damage is done to: thirty records, a queue, a group, closed."""
    with opened(path) as store:
        s = store.stream("s", partitions=2, segment_bytes=SEGMENT)
        for i in range(30):
            s.append(b"%d " % i * 1500, partition=0, timestamp=BEGIN + i)
        s.append(b"other", partition=1, timestamp=BEGIN)
        q = store.queue("q", capacity=20, dead_limit=4, payload_bytes=SEGMENT)
        for value in (b"needle", b"long" * 2000, b"fine"):
            q.put(value)
        with s.consumer(group="g", max_records=2) as consumer:
            for _ in range(3):
                consumer.commit(consumer.poll(0))


def torn_tail(path):
    """A power cut: the last batch came to the disk in part, the store was not closed."""
    live = path.with_name("live")
    with opened(live) as store:
        s = store.stream("s", segment_bytes=SEGMENT)
        for i in range(10):
            s.append(b"%d " % i * 500, timestamp=BEGIN + i)
        store.flush()
        s.append(b"torn" * 500, timestamp=BEGIN + 10)
        copy(live, path)
    shutil.rmtree(live)
    batch = batch_at(path, "s", 0, 10)
    poke(place(path, batch), batch.file_position + 700, bytes(300))


def corrupt_batch(path):
    """A bit of a synced batch has turned over."""
    batch = batch_at(path, "s", 0, 8)
    flip(place(path, batch), batch.file_position + 100)


def newer_batch(path):
    """A batch of format 2, whole."""
    batch = batch_at(path, "s", 0, 8)
    file = place(path, batch)
    data = bytearray(file.read_bytes())
    at, end = batch.file_position, batch.file_position + batch.length
    data[at + 12] = 2
    (salt,) = struct.unpack_from("<Q", data, 48)
    seed = (salt + batch.position) % (1 << 64)
    struct.pack_into("<Q", data, at, xxhash.xxh3_64_intdigest(bytes(data[at + 8 : end]), seed))
    file.write_bytes(data)


def newer_store(path):
    """A store of format 2."""
    body = json.loads((path / "store.json").read_text())["body"] | {"format": 2}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    whole = {"body": body, "checksum": xxhash.xxh3_64_hexdigest(text.encode())}
    (path / "store.json").write_text(json.dumps(whole))


def short_control(path):
    os.truncate(path / "streams/s/control", 4196)


def bad_index(path):
    """An entry of the sparse index that leads astray."""
    poke(sorted((path / "streams/s/00000").glob("*.seg"))[0], 8192 + 16, struct.pack("<II", 3, 77))


def missing_segment(path):
    sorted((path / "streams/s/00000").glob("*.seg"))[1].unlink()


def short_segment(path):
    os.truncate(sorted((path / "streams/s/00000").glob("*.seg"))[1], 20_000)


def damaged_members(path):
    flip(path / "members", 3)


def damaged_slot(path):
    _, at = slot_at(path, "q", b"needle")
    flip(path / "queues/q/slots", at + 96 + 2)


def damaged_block(path):
    message, _ = slot_at(path, "q", b"long")
    flip(path / "queues/q/blocks", 4096 + 4096 + message.blocks[0] * 4096 + 50)


def damaged_word(path):
    """A state word with one bit turned over: no state at all."""
    message, _ = slot_at(path, "q", b"needle")
    flip(path / "queues/q/slots", 4096 + 8 * message.slot + 7, 6)


def damaged_hints(path):
    (path / "queues/q/hints").write_bytes(b"\xa5" * (path / "queues/q/hints").stat().st_size)


def copies(path):
    """Where the two copies of partition 0's position lie: (sequence, byte)."""
    data = (path / "streams/s/groups/g.group").read_bytes()
    places = (20480 + 64, 20480 + 128)
    return sorted((struct.unpack_from("<Q", data, at + 8)[0], at) for at in places)


def torn_position(path):
    """The newer copy of a position is torn: the one before it holds."""
    flip(path / "streams/s/groups/g.group", copies(path)[-1][1] + 24)


def lost_position(path):
    """Both copies are damaged."""
    for _, at in copies(path):
        flip(path / "streams/s/groups/g.group", at + 24)


def damaged_journal_page(path):
    flip(path / "streams/@journal/page", 3)


def damaged_sequences(path):
    for name in (path / "streams/orders").glob("*/sequences"):
        flip(name, 70)


def damaged_view(path):
    flip(path / "streams/prices/view", 100)


DAMAGED = {
    torn_tail: None, corrupt_batch: plain, newer_batch: plain, newer_store: plain,
    short_control: plain, bad_index: plain, missing_segment: plain, short_segment: plain,
    damaged_members: plain,
    damaged_slot: plain, damaged_block: plain, damaged_word: plain, damaged_hints: plain,
    torn_position: plain, lost_position: plain, damaged_journal_page: recorded,
    damaged_sequences: producers, damaged_view: compacted,
}  # fmt: skip


# archives ---------------------------------------------------------------------------------------


def pack(path, archive):
    """A directory as a .tar.xz that holds nothing of this machine and no time."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:xz", preset=9) as tar:
        for name in sorted(path.rglob("*")):
            info = tarfile.TarInfo(str(name.relative_to(path)))
            if name.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(info)
            else:
                data = name.read_bytes()
                info.size, info.mode = len(data), 0o600
                tar.addfile(info, io.BytesIO(data))
    archive.write_bytes(raw.getvalue())


def main(target):
    target.mkdir(exist_ok=True)
    for make in GOOD:
        with tempfile.TemporaryDirectory() as name:
            told, path = Told(), Path(name) / make.__name__
            make(path, told)
            pack(path, target / f"{make.__name__}.tar.xz")
            (target / f"{make.__name__}.json").write_text(told.json())
    for damage, base in DAMAGED.items():
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / damage.__name__
            if base is not None:
                base(path) if base is plain else base(path, Told())
            damage(path)
            pack(path, target / f"{damage.__name__}.tar.xz")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
