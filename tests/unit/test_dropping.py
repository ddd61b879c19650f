"""What a drop does, and who meets one, where the file system or another process comes between."""

import errno
import os

import pytest

import millstream
from millstream import Closed, NotFound, StorageError
from millstream.disk import files, publish
from millstream.store import backup


@pytest.fixture
def left(store):
    """A directory that was being removed in its place."""
    store.stream("s", create=True)
    path = store.session.root / "left"
    files.make_directory(path)
    for name in (files.LEFT, "more"):
        files.replace(path / name, b"")
    return path


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def test_what_two_remove_at_once_goes(left, monkeypatch):
    real, errors = files.remove_whole, [StorageError(errno.ENOENT, "gone", left), NotFound("gone")]

    def beside(*arguments, **options):
        if errors:
            raise errors.pop()
        real(*arguments, **options)

    monkeypatch.setattr(files, "remove_whole", beside)
    assert publish.finish_drop(left)
    assert not errors
    assert not files.exists(left)
    assert not publish.finish_drop(left)


def test_what_cannot_be_removed_is_said(left, monkeypatch):
    def fail(*arguments, **options):
        raise StorageError(errno.EIO, "broken", left)

    monkeypatch.setattr(files, "remove_whole", fail)
    with pytest.raises(StorageError, match="broken"):
        publish.finish_drop(left)
    assert files.exists(left / files.LEFT)


def test_directory_that_others_fill_again_and_again_is_said(left, monkeypatch):
    monkeypatch.setattr(files, "REMOVALS_MOST", 2)
    monkeypatch.setattr(files, "names", lambda path: [])
    with pytest.raises(StorageError, match="not empty"):
        files.remove_tree(left)


@pytest.mark.parametrize("case", ["another directory", "gone", "refused"])
def test_only_what_was_meant_is_withdrawn(store, monkeypatch, case):
    stream = store.stream("s", create=True)
    parent, held = store.session.root / "streams", stream.path.directory
    expected = StorageError if case == "refused" else NotFound
    if case == "another directory":
        held = store.session.directory
    else:

        def rename(path, target):
            if case == "gone":
                os.rename(path, os.path.join(store.path, "elsewhere"))
            raise StorageError(errno.EIO if case == "refused" else errno.ENOENT, "no", path)

        monkeypatch.setattr(files, "rename", rename)
    with pytest.raises(expected), publish.withdrawn(parent, "s", "stream.json", held):
        raise AssertionError("it was not withdrawn")


def test_files_of_what_was_dropped_are_closed(store):
    found = store.queue("q", create=True)._files
    store.drop_queue("q")
    with pytest.raises(Closed, match="dropped"):
        found.sync_one("slots")


def test_file_whose_directory_goes_while_it_is_opened_is_not_there(store, monkeypatch):
    def gone(path):
        raise FileNotFoundError(errno.ENOENT, "gone", path)

    monkeypatch.setattr(files, "_stat", gone)
    with pytest.raises(NotFound, match="no such file"):
        files.open_file(store.session.config_path, write=False)


@pytest.mark.parametrize("kind", ["stream", "queue"])
def test_what_is_missing_in_a_stream_that_is_there_is_no_drop(store, tmp_path, monkeypatch, kind):
    """Neither is it made anew, nor left out of a backup."""
    getattr(store, kind)("x", create=True)
    with millstream.open(store.path) as other:

        def missing(*arguments):
            raise NotFound("a file of it is missing")

        monkeypatch.setattr(files, "read_json", missing)
        with pytest.raises(NotFound, match="a file of it"):
            getattr(other, kind)("x", create=True)
        monkeypatch.undo()
        if kind == "stream":
            monkeypatch.setattr(backup, "_groups", missing)
            with pytest.raises(NotFound, match="a file of it"):
                other.backup(tmp_path / "copy")
