"""Members, the gate and the owner word, in one process: entries, proofs of death, descriptions."""

import os
import stat

import pytest

import millstream
from millstream import _native
from millstream.disk import files, members


@pytest.fixture
def store_path(tmp_path):
    with millstream.open(tmp_path / "store"):
        pass
    return tmp_path / "store"


def test_members_claim_entries_one_after_another_and_free_them(store_path):
    with millstream.open(store_path) as a, millstream.open(store_path) as b:
        assert [a.session.members.index, b.session.members.index] == [0, 1]
        assert a.session.members.anyone()
        assert b.session.members.anyone()
    with millstream.open(store_path) as c:
        assert c.session.members.index == 0
        assert not c.session.members.anyone()


def test_incarnation_proves_that_an_earlier_owner_of_the_entry_is_dead(store_path):
    with millstream.open(store_path) as store:
        earlier = store.session.members.word
    with millstream.open(store_path) as store:
        assert store.session.members.word != earlier
        assert store.session.members.is_dead(earlier)
        assert not store.session.members.is_dead(store.session.members.word)


def test_living_member_is_not_dead_and_a_closed_one_is(store_path):
    with millstream.open(store_path) as a:
        b = millstream.open(store_path)
        word = b.session.members.word
        assert not a.session.members.is_dead(word)
        assert f"process {os.getpid()} (member 1)" == a.session.members.describe(word)
        b.close()
        assert a.session.members.is_dead(word)


def test_free_word_and_word_beyond_all_entries(store_path):
    with millstream.open(store_path) as store:
        assert not store.session.members.is_dead(0)
        assert store.session.members.is_dead(_native.owner_word(members.COUNT, 1))
        assert "unknown" in store.session.members.describe(_native.owner_word(members.COUNT, 1))


def test_gate_is_exclusive_for_writers_and_times_out(store_path):
    with millstream.open(store_path) as store:
        store.session.members.enter_gate(1.0)
        with pytest.raises(millstream.LockTimeout, match="gate"):
            millstream.open(store_path, timeout=0.05)
        store.session.members.leave_gate()
        millstream.open(store_path, timeout=1.0).close()


def test_every_entry_taken_is_an_error_that_says_so(store_path, monkeypatch):
    monkeypatch.setattr(members, "COUNT", 2)
    with (
        millstream.open(store_path),
        millstream.open(store_path),
        pytest.raises(millstream.StorageError, match="entries are taken"),
    ):
        directory = files.Directory(str(store_path))
        store = members.Members(directory.path, write=True)
        try:
            monkeypatch.setattr(store, "check", lambda _: None)
            store.claim(b"")
        finally:
            store.close()


def test_members_file_removed_or_replaced_while_open_is_refused(store_path):
    path = store_path / "members"
    with millstream.open(store_path) as store:
        store.stream("s").append(b"1")
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(millstream.StorageError, match="missing while"):
            millstream.open(store_path)
        path.write_bytes(kept)
        path.chmod(0o600)
        with pytest.raises(millstream.StorageError, match="not the file of"):
            millstream.open(store_path)
        store.stream("s").append(b"2")
    with millstream.open(store_path) as store:
        assert store.stream("s").next_offset(0) == 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"x" * 65600])
def test_members_file_damaged_while_closed_is_made_anew(store_path, damage):
    (store_path / "members").write_bytes(damage)
    with millstream.open(store_path) as store:
        store.stream("s").append(b"1")
        with millstream.open(store_path) as joiner:
            assert joiner.stream("s").next_offset(0) == 1


def test_members_file_of_another_store_is_refused_by_a_joiner(tmp_path):
    with millstream.open(tmp_path / "a") as a, millstream.open(tmp_path / "b") as b:
        (tmp_path / "a/members").write_bytes((tmp_path / "b/members").read_bytes())
        with pytest.raises(millstream.CorruptBatch, match="not the members file"):
            millstream.open(tmp_path / "a")
        assert a.session.id != b.session.id


def test_members_file_is_private(store_path):
    assert stat.S_IMODE((store_path / "members").stat().st_mode) == 0o600


def test_lock_of_ones_own_description_does_not_count(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64))
    first, second = (files.open_file(str(path), write=True) for _ in range(2))
    try:
        assert files.try_lock(first, 3)
        assert not files.is_locked(first, 3)
        assert files.is_locked(second, 3)
        assert not files.try_lock(second, 3)
        files.unlock(first, 3)
        assert files.try_lock(second, 3, shared=True)
        assert files.try_lock(first, 3, shared=True)
    finally:
        os.close(first)
        os.close(second)
