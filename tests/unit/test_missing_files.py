"""Files of a partition that are gone, or cut short: what had been synced is never cut off silently.

What a clean store's control file says is trusted; of one that was not closed the durable mark.
"""

import shutil

import pytest

import millstream
from millstream import CorruptBatch, inspect

RECORDS = 30


def value_of(number):
    return b"%d " % number + b"v" * 3000


def written(path, durability="interval", *, retire=False):
    """Two partitions, of which the first has several segments."""
    store = millstream.open(path)
    stream = store.stream("s", partitions=2, segment_bytes=1 << 16, durability=durability)
    for i in range(RECORDS):
        stream.append(value_of(i), partition=0)
    stream.append(b"other", partition=1)
    if retire:
        assert stream.delete_before(millstream.Position(0, 1, RECORDS - 1)) > 0
    return store


def files_of(path):
    found = sorted((path / "streams/s/00000").glob("*.seg"))
    used = [file for file in found if file.read_bytes()[4096:4104] != bytes(8)]
    assert used
    return used


def tree(path):
    return {file: file.read_bytes() for file in (path / "streams/s").rglob("*.seg")}


def damaged(path, mode="rw"):
    """Open it, see what there is refused to the end; the values before it."""
    found = []
    with millstream.open(path, mode=mode) as store:
        stream = store.stream("s")
        with pytest.raises(CorruptBatch) as caught:
            for batch in stream.read(partition=0):
                found += [bytes(value) for value in batch.values]
        assert ".seg" in caught.value.path and "00000/" in caught.value.path
        if "its end at" in str(caught.value.found):
            assert "all of it synced" in str(caught.value) and "estore" in str(caught.value)
        with pytest.raises(CorruptBatch):
            list(stream.read(partition=0, start=RECORDS - 1, durable=True))
        assert [bytes(v) for b in stream.read(partition=1) for v in b.values][:1] == [b"other"]
        if mode == "rw":
            for _ in range(2):
                with pytest.raises(CorruptBatch):
                    stream.append(b"new", partition=0)
            stream.append(b"more", partition=1)
    return found


def whole(path):
    with millstream.open(path) as store:
        return [bytes(v) for b in store.stream("s").read(partition=0) for v in b.values]


def kill_newest(path):
    files_of(path)[-1].unlink()


def kill_directory(path):
    shutil.rmtree(path / "streams/s/00000")


def kill_oldest(path):
    files_of(path)[0].unlink()


def cut_newest(path):
    last = files_of(path)[-1]
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])


def zero_newest(path):
    last = files_of(path)[-1]
    last.write_bytes(last.read_bytes()[: 4096 + 8192].ljust(last.stat().st_size, b"\0"))


DAMAGES = [kill_newest, kill_directory, kill_oldest, cut_newest]


@pytest.mark.parametrize("mode", ["rw", "r"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("retire", [False, True])
def test_what_a_clean_store_says_is_there_must_be(tmp_path, damage, mode, retire):
    path = tmp_path / "s"
    written(path, retire=retire).close()
    if retire and damage is kill_oldest:
        with millstream.open(path) as store:  # have another one behind it
            for i in range(RECORDS, 2 * RECORDS):
                store.stream("s").append(value_of(i), partition=0)
    everything = whole(path)
    original = tmp_path / "original"
    shutil.copytree(path, original)
    damage(path)
    before = tree(path)
    for _ in range(3):  # each generation sees the same
        found = damaged(path, mode)
        assert found == everything[: len(found)] and len(found) < len(everything)
    after = tree(path)
    assert {file: after[file] for file in before if "/00000/" in str(file)} == {
        file: data for file, data in before.items() if "/00000/" in str(file)
    }
    shutil.rmtree(path / "streams/s/00000", ignore_errors=True)
    shutil.copytree(original / "streams/s/00000", path / "streams/s/00000")
    assert whole(path) == everything  # restored, it goes on
    with millstream.open(path) as store:
        assert store.stream("s").append(b"new", partition=0).offset >= RECORDS
    assert inspect.verify(path).ok


@pytest.mark.parametrize("damage", [*DAMAGES[:2], cut_newest, zero_newest])
def test_what_was_synced_before_a_kill_must_be_there(tmp_path, damage):
    alive, path = tmp_path / "alive", tmp_path / "s"
    with written(alive, "sync"):
        shutil.copytree(alive, path)  # as a kill leaves it
    everything = whole(alive)
    damage(path)
    for mode in ("r", "rw", "rw", "r"):
        found = damaged(path, mode)
        assert found == everything[: len(found)] and len(found) < len(everything)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("damage", "clean"),
    [
        (kill_newest, True),
        (kill_directory, True),
        (kill_oldest, True),  # of one that is not clean, retention may have taken it
        (kill_newest, False),
        (kill_directory, False),
    ],
)
def test_repair_gives_up_what_is_gone_and_says_so(tmp_path, damage, opened, clean):
    alive, path = tmp_path / "alive", tmp_path / "s"
    with written(alive, "sync") as store:
        if not clean:
            shutil.copytree(alive, path)
    if clean:
        shutil.copytree(alive, path)
    everything = whole(alive)
    damage(path)
    kept = [] if damage is kill_directory else None
    if opened:
        damaged(path)
    assert {problem.kind for problem in inspect.verify(path).problems} == {"missing"}
    dry = inspect.repair(path, dry_run=True)
    done = inspect.repair(path)
    assert [str(action) for action in dry] == [str(action) for action in done]
    lost = [action for action in done if action.kind == "given_up"]
    assert lost and all("lost" in action.text and ".seg" in action.text for action in lost)
    assert not any(action.kind == "cannot" for action in done)
    assert inspect.verify(path).ok
    found = whole(path)
    if kept is not None:
        assert found == kept
    else:
        assert 0 < len(found) < RECORDS
        last = damage is kill_oldest
        assert found == (everything[-len(found) :] if last else everything[: len(found)])
    with millstream.open(path) as store:
        stream = store.stream("s")
        position = stream.append(b"new", partition=0)
        assert position.epoch > 1
        assert [bytes(v) for b in stream.read(partition=0) for v in b.values] == [*found, b"new"]
    assert inspect.verify(path).ok


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("gone", [1, 2, 0])
def test_the_range_that_is_lost_begins_where_the_last_file_that_is_left_ends(tmp_path, gone, clean):
    """Said were the offsets of the last file that is there, and the name of the active one."""
    alive, path, end = tmp_path / "alive", tmp_path / "s", 4 * RECORDS
    with written(alive, "sync") as store:
        for i in range(RECORDS, end):
            store.stream("s").append(value_of(i), partition=0)
        if not clean:
            shutil.copytree(alive, path)
    if clean:
        shutil.copytree(alive, path)
    files = files_of(path)
    assert len(files) > 3
    first = files[-gone]  # 0: all of them
    begins = next(b.base_offset for b in inspect.batches(path, "s", 0) if b.path == first)
    for file in (path / "streams/s/00000").glob("*.seg"):
        if file.name >= first.name:
            file.unlink()
    (problem,) = inspect.verify(path).problems
    assert (problem.kind, problem.path.name) == ("missing", first.name)
    assert problem.offset_range == (begins, end)
    found = []
    with pytest.raises(CorruptBatch, match=first.name):
        for batch in inspect.batches(path, "s", 0):
            found += batch.offsets.tolist()
    assert found == list(range(begins))
    with millstream.open(path, mode="r") as store, pytest.raises(CorruptBatch, match=first.name):
        list(store.stream("s").read(partition=0))
    (given_up,) = [one for one in inspect.repair(path) if one.kind == "given_up"]
    assert f"records {begins} to {end} (not included) are lost" in given_up.text


def test_batches_before_a_file_that_cannot_be_read_are_yielded_first(tmp_path):
    path = tmp_path / "s"
    written(path).close()
    second = files_of(path)[1]
    last = max(b.next_offset for b in inspect.batches(path, "s", 0) if b.path < second)
    second.write_bytes(b"x" * second.stat().st_size)
    found = []
    with pytest.raises(CorruptBatch, match=second.name):
        for batch in inspect.batches(path, "s", 0):
            found += batch.offsets.tolist()
    assert found == list(range(last))


def test_a_store_that_is_not_there_is_not_found(tmp_path):
    """It was a StorageError of whatever file was opened first."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    for path in (tmp_path / "nix", tmp_path / "other"):
        for call in (
            inspect.verify,
            inspect.repair,
            inspect.store,
            lambda path: list(inspect.batches(path, "s", 0)),
            lambda path: list(inspect.records(path)),
            lambda path: list(inspect.dump(path)),
            lambda path: list(inspect.messages(path, "q")),
        ):
            with pytest.raises(millstream.NotFound, match="no store in"):
                call(path)
