"""A torn tail is cut, what was synced never: damaged copies of one store, judged one by one."""

import os
import random
import shutil
import struct
import sys

import crash_workers as workers
import pytest

import millstream
from millstream import inspect
from millstream.inspect import repair

SEGMENT = 1 << 16


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A store of several segments whose writer was killed: 60 synced batches, then 40 others."""
    path = tmp_path_factory.mktemp("killed") / "store"
    writer = workers.start("test_torn_or_corrupt.write_and_die", str(path))
    assert workers.line(writer) == "written"
    workers.kill(writer)
    return path


def write_and_die(path, count=100, synced=60, last=-1):
    """Batches of three records, the first of them and a last one synced; 5 in another partition.

    Then wait to be killed.
    """
    from millstream.store.background import Background

    Background.notice = lambda *_: None
    store = millstream.open(path)
    stream = store.stream("s", partitions=2, segment_bytes=SEGMENT)
    for i in range(5):
        stream.append(b"other %d" % i, partition=1, durability="sync")
    for i in range(count):
        values = [b"%d " % (3 * i + j) + b"v" * 900 for j in range(3)]
        level = "sync" if i < synced or i == last else "process"
        stream.append_many(values, partition=0, durability=level)
    print("written", flush=True)
    input()


def batches(directory):
    """(file, position, length, first offset) of each batch of partition 0, by docs/format.md."""
    found = []
    segments = sorted((directory / "streams/s/00000").glob("*.seg"))
    bases = []
    for path in segments:
        data = path.read_bytes()
        if data[4096:4104] != bytes(8):
            bases.append((path, data, struct.unpack_from("<Q", data, 4096 + 24)[0]))
    for i, (path, data, base) in enumerate(bases):
        at = start = struct.unpack_from("<I", data, 68)[0]
        end = bases[i + 1][2] - base + start if i + 1 < len(bases) else len(data)
        while at < end:
            length, first = (
                struct.unpack_from("<I", data, at + 8)[0],
                struct.unpack_from("<Q", data, at + 16)[0],
            )
            if length == 0:
                break
            found.append((path.name, at, length, first))
            at += length
    return found


def copy(killed, tmp_path, name="copy"):
    target = tmp_path / name
    shutil.copytree(killed, target)
    return target


def change(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def numbers(stream, partition=0):
    return [
        int(bytes(v).split(b" ")[0])
        for batch in stream.read(partition=partition)
        for v in batch.values
    ]


def read_until_damage(stream):
    found = []
    with pytest.raises(millstream.CorruptBatch) as caught:
        for batch in stream.read(partition=0):
            found += [int(bytes(v).split(b" ")[0]) for v in batch.values]
    return found, caught.value


def others_work(stream):
    assert [bytes(v) for b in stream.read(partition=1) for v in b.values][:5] == [
        b"other %d" % i for i in range(5)
    ]
    stream.append(b"more", partition=1)


def test_torn_tail_is_cut_at_every_place(killed, tmp_path):
    seed = workers.seed_of("torn_tail")
    dice = random.Random(seed)
    known = batches(killed)
    assert len(known) == 100
    faults = 0
    for index in [60, 61, 99, *dice.sample(range(60, 100), 12)]:
        name, at, length, first = known[index]
        store_path = copy(killed, tmp_path)
        parts = store_path / "streams/s/00000"
        torn = at + dice.randrange(0, length)
        kind = dice.choice(("zeros", "page"))
        size = (parts / name).stat().st_size
        if kind == "zeros":
            change(parts / name, torn, bytes(size - torn))
        else:
            page = (at + dice.randrange(length)) // 4096 * 4096
            page = max(page, at)
            change(parts / name, page, bytes(min(4096, at + length - page)))
        for later in sorted(parts.glob("*.seg")):
            if later.name > name and dice.random() < 0.5:
                # The record of its activation did not reach the disk either
                change(later, 4096, bytes(128))
        with millstream.open(store_path) as store:
            stream = store.stream("s")
            assert numbers(stream) == list(range(first)), (seed, index, kind)
            others_work(stream)
            position = stream.append(b"%d new" % first, partition=0)
            assert (position.offset, position.epoch) == (first, 2)
            # An offset that was lost and given to another record is not mistaken for it.
            if index < 99:
                with pytest.raises(millstream.OffsetOutOfRange):
                    next(iter(stream.read(start=millstream.Position(0, 1, first + 1))))
            segments = sorted(path.name for path in parts.iterdir())
            later = [n for n in {batch[0] for batch in known} if n > name]
            assert all(f"{n}.lost" in segments and n not in segments for n in later), segments
        with millstream.open(store_path) as store:
            assert numbers(store.stream("s")) == list(range(first + 1))
        workers.verified(store_path)
        shutil.rmtree(store_path)
        faults += 1
    workers.report(faults * 300, faults, seed)


def test_damage_under_synced_bytes_is_loud_and_local(killed, tmp_path):
    seed = workers.seed_of("damage")
    dice = random.Random(seed)
    known = batches(killed)
    faults = 0
    for index in [0, 1, 57, *dice.sample(range(58), 12)]:
        name, at, length, first = known[index]
        store_path = copy(killed, tmp_path)
        # The durable mark lies behind it, so the control file must not make us pass it over either.
        (store_path / "streams/s/control").unlink()
        path = store_path / "streams/s/00000" / name
        where = at + dice.randrange(length)
        if dice.random() < 0.3:
            change(path, where // 8 * 8, b"\xff" * 8)
        else:
            flip(path, where, dice.randrange(8))
        damaged = path.read_bytes()
        if (
            damaged[at : at + length]
            == (killed / "streams/s/00000" / name).read_bytes()[at : at + length]
        ):
            continue  # the bytes were 0xff already
        with millstream.open(store_path) as store:
            stream = store.stream("s")
            found, error = read_until_damage(stream)
            assert found == list(range(first)), (seed, index)
            assert "00000" in error.path and error.position is not None
            with pytest.raises(millstream.CorruptBatch):
                stream.append(b"x", partition=0)
            others_work(stream)
        assert path.read_bytes()[at : at + length] == damaged[at : at + length], "bytes are kept"
        with millstream.open(store_path) as store:  # and the next generation sees the same
            found, _ = read_until_damage(store.stream("s"))
            assert found == list(range(first))
        assert [action.kind for action in repair(store_path)] != []
        with millstream.open(store_path) as store:
            stream = store.stream("s")
            found = numbers(stream)
            assert set(range(300)) - set(found) == set(range(first, first + 3)), (seed, index)
            stream.append(b"300 new", partition=0)
        with millstream.open(store_path) as store:
            assert numbers(store.stream("s"))[-1] == 300
        shutil.rmtree(store_path)
        faults += 1
    workers.report(faults * 300, faults, seed)


@pytest.mark.parametrize("which", ["header", "activation"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_damaged_head_of_a_synced_segment_loses_nothing_silently(killed, tmp_path, which, number):
    known = batches(killed)
    names = sorted({batch[0] for batch in known[:60]})
    assert len(names) > 2
    name = names[number]
    first = next(batch[3] for batch in known if batch[0] == name)
    store_path = copy(killed, tmp_path)
    path = store_path / "streams/s/00000" / name
    flip(path, 50 if which == "header" else 4096 + 30)
    before = sorted(entry.name for entry in path.parent.iterdir())
    for _ in range(2):
        with millstream.open(store_path) as store:
            stream = store.stream("s")
            found, _ = read_until_damage(stream)
            assert found == list(range(first))
            with pytest.raises(millstream.CorruptBatch):
                stream.append(b"x", partition=0)
            others_work(stream)
        assert sorted(entry.name for entry in path.parent.iterdir()) == before, (
            "nothing was set aside"
        )
    workers.report(300, 1, 0)


def test_flipped_bit_of_a_clean_store_is_met_by_the_reader(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        stream = store.stream("s", segment_bytes=SEGMENT)
        for i in range(30):
            stream.append(b"%d " % i + b"v" * 900)
    name, at, _, first = batches(path)[10]
    flip(path / "streams/s/00000" / name, at + 200)
    with millstream.open(path) as store:
        found, error = read_until_damage(store.stream("s"))
        assert found == list(range(first))
        assert error.path.endswith(name)
    workers.report(30, 1, 0)


def test_damaged_configuration_is_named(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        store.stream("s").append(b"1")
    for name in ("store.json", "streams/s/stream.json"):
        original = (path / name).read_bytes()
        for damage in (
            original[:20],
            b"",
            original.replace(b'"format": 1', b'"format": 3'),
            b"\xff" * 50,
        ):
            (path / name).write_bytes(damage)
            with (
                pytest.raises(
                    (millstream.CorruptBatch, millstream.VersionMismatch),
                    match=name.rsplit("/", 1)[-1],
                ),
                millstream.open(path) as store,
            ):
                store.stream("s")
        (path / name).write_bytes(original)
    with millstream.open(path) as store:
        assert store.stream("s").next_offset(0) == 1


def test_control_file_damaged_while_closed_is_made_anew(tmp_path):
    seed = workers.seed_of("control")
    dice = random.Random(seed)
    path = tmp_path / "store"
    with millstream.open(path) as store:
        stream = store.stream("s", partitions=2, segment_bytes=SEGMENT)
        for i in range(100):
            stream.append(b"%d " % i + b"v" * 900, partition=0)
            stream.append(b"%d" % i, partition=1)
    control = path / "streams/s/control"
    original = control.read_bytes()
    block = 4096
    places = [
        0,
        8,
        12,
        16,
        32,
        *(block + field for field in (8, 16, 24, 40, 48, 72, 80, 136, 144, 152, 153)),
    ]
    faults = 0
    for kind in ("gone", "empty", "short", "zero", *places, *places):
        clean = tmp_path / "copy"
        shutil.copytree(path, clean)
        target = clean / "streams/s/control"
        if kind == "gone":
            target.unlink()
        elif kind == "empty":
            target.write_bytes(b"")
        elif kind == "short":
            target.write_bytes(original[:4200])
        elif kind == "zero":
            target.write_bytes(bytes(len(original)))
        else:
            flip(target, kind + dice.randrange(4), dice.randrange(8))
        with millstream.open(clean) as store:
            stream = store.stream("s")
            assert numbers(stream) == list(range(100)), (seed, kind)
            assert stream.append(b"100", partition=0).offset == 100
            assert stream.next_offset(1) == 100
        with millstream.open(clean) as store:
            assert numbers(store.stream("s")) == list(range(101))
        workers.verified(clean)
        shutil.rmtree(clean)
        faults += 1
    workers.report(faults * 200, faults, seed)


def open_badly(step):
    """Open each store that a line names, and end at a step of what follows, without a close."""
    from millstream.log import control, recovery

    def end(*_, **__):
        os._exit(0)

    def after(function):
        return lambda *args, **options: (function(*args, **options), end())

    for text in sys.stdin:
        child = os.fork()
        if child == 0:
            changed = {
                "not rebuilt": (control, "rebuild", end),
                "rebuilt": (control, "rebuild", after(control.rebuild)),
                "walked": (recovery, "_sync_kept", end),
                "synced": (recovery, "_open", end),
                "recovered": (recovery, "_open", after(recovery._open)),
            }
            if step in changed:
                setattr(*changed[step])
            with millstream.open(text.strip()) as store:
                with pytest.raises(millstream.CorruptBatch):
                    store.stream("s").append(b"refused", partition=0, durability="sync")
                if step == "refused":
                    end()
            end()
        _, status = os.waitpid(child, 0)
        print(f"ended with {status}", flush=True)


@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    """A store of several segments, all of it synced, whose writer was killed."""
    path = tmp_path_factory.mktemp("synced") / "store"
    writer = workers.start("test_torn_or_corrupt.write_and_die", str(path), 68, 68)
    assert workers.line(writer) == "written"
    workers.kill(writer)
    return path


STEPS = ["not rebuilt", "rebuilt", "walked", "synced", "recovered", "refused", "closed"]


@pytest.mark.parametrize("step", STEPS)
def test_repair_mends_the_same_after_an_open_that_failed(synced, tmp_path, step):
    """Taken for the end of the log was where the open had found the damage to begin."""
    known = batches(synced)
    first = min(i for i in range(68) if known[i][0] == known[67][0])
    worker = workers.start("test_torn_or_corrupt.open_badly", step)
    # Each time the last batch but one: an open walks no more than what leads to the last synced.
    damages = [{66}, {first, 66}, {20, first - 1, 66}]
    for lost in damages:
        path = copy(synced, tmp_path)
        for i in lost:
            name, at, length, _ = known[i]
            change(path / "streams/s/00000" / name, at + length // 2, b"\xff\xff\xff")
        assert workers.ask(worker, str(path)) == "ended with 0"
        assert not inspect.verify(path).ok
        assert [a.kind for a in repair(path) if a.kind != "unclean"] == ["filler"] * len(lost)
        assert inspect.verify(path).ok
        assert repair(path) == []
        with millstream.open(path) as store:
            stream = store.stream("s")
            assert numbers(stream) == [n for n in range(204) if n // 3 not in lost]
            stream.append(b"204 new", partition=0)
        assert inspect.verify(path).ok
        shutil.rmtree(path)
    workers.stop(worker)
    workers.report(204 * len(damages), len(damages), 0)


def test_repair_tells_damage_by_what_was_synced_where_no_batch_proves_it(tmp_path):
    """One sync at the end: no batch was written when one before it was durable."""
    path = tmp_path / "store"
    writer = workers.start("test_torn_or_corrupt.write_and_die", str(path), 60, 0, 59)
    assert workers.line(writer) == "written"
    workers.kill(writer)
    known = batches(path)
    end = max(i for i in range(60) if known[i][0] == known[0][0])
    for i in (5, end, 58):
        name, at, length, _ = known[i]
        change(path / "streams/s/00000" / name, at + length // 2, b"\xff\xff\xff")
    assert {problem.kind for problem in inspect.verify(path).problems} == {"batch"}
    assert [action.kind for action in repair(path)] == ["filler"] * 3
    assert inspect.verify(path).ok
    assert repair(path) == []
    with millstream.open(path) as store:
        stream = store.stream("s")
        assert numbers(stream) == [n for n in range(180) if n // 3 not in (5, end, 58)]
    workers.report(180, 3, 0)


def test_repair_of_damage_before_a_segment_that_is_gone_needs_one_run(synced, tmp_path):
    known = batches(synced)
    path = copy(synced, tmp_path)
    name, at, length, _ = known[20]
    change(path / "streams/s/00000" / name, at + length // 2, b"\xff\xff\xff")
    first = min(i for i in range(68) if known[i][0] == known[67][0])
    (path / "streams/s/00000" / known[67][0]).unlink()
    assert [problem.kind for problem in inspect.verify(path).problems] == ["batch", "missing"]
    assert [action.kind for action in repair(path)] == ["filler", "given_up"]
    assert inspect.verify(path).ok
    assert repair(path) == []
    with millstream.open(path) as store:
        stream = store.stream("s")
        assert numbers(stream) == [n for n in range(3 * first) if n // 3 != 20]
        stream.append(b"204 new", partition=0)
    workers.report(204, 2, 0)


def test_repair_rebuilds_an_activation_record_before_batches_that_were_synced(synced, tmp_path):
    """The end of the segment before it is no damage, though later batches prove it durable."""
    known = batches(synced)
    path = copy(synced, tmp_path)
    names = sorted({batch[0] for batch in known})
    flip(path / "streams/s/00000" / names[1], 4096 + 30)
    assert {problem.kind for problem in inspect.verify(path).problems} == {"activation", "missing"}
    planned = repair(path, dry_run=True)
    assert [action.kind for action in planned] == ["activation"]
    assert repair(path) == planned
    assert inspect.verify(path).ok
    assert repair(path) == []
    with millstream.open(path) as store:
        assert numbers(store.stream("s")) == list(range(204))
    workers.report(204, 1, 0)


@pytest.mark.parametrize("number", [0, 1, -1])
@pytest.mark.parametrize("size", [8, 72])
def test_repair_rebuilds_an_activation_record_that_was_wiped_out(synced, tmp_path, number, size):
    """It looked like that of a spare, and the log was refused for good."""
    known = batches(synced)
    path = copy(synced, tmp_path)
    names = sorted({batch[0] for batch in known})
    change(path / "streams/s/00000" / names[number], 4096, bytes(size))
    assert "activation" in {problem.kind for problem in inspect.verify(path).problems}
    planned = repair(path, dry_run=True)
    assert [action.kind for action in planned] == ["activation"]
    assert repair(path) == planned
    assert inspect.verify(path).ok
    assert repair(path) == []
    with millstream.open(path) as store:
        stream = store.stream("s")
        assert numbers(stream) == list(range(204))
        stream.append(b"204 new", partition=0)
    workers.report(204, 1, 0)
