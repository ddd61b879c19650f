"""A power cut, simulated: what was synced is kept, and of all else any part.

`Disk(root)` stands in for the functions of `millstream.disk.files` that sync. It knows of each file
what it held when its last sync ended, and of each directory which names it had. `cut` builds what a
power cut could leave now: a name that was not synced is there or not, and each 4 KiB page of a file
is as synced or as it is now.
"""

import os
import stat
from pathlib import Path

from millstream.disk import files

PAGE = 4096


def content(path):
    with open(path, "rb") as file:
        return file.read()


class Disk:
    """Pages and names of a directory, as synced; what is there at the start counts as synced."""

    unit = PAGE  # what is kept or lost whole

    def __init__(self, root, monkeypatch, on_call=lambda: None):
        self.root = str(root)
        self.files: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.is_directory: dict[int, bool] = {}
        self.on_call = on_call
        for path, _, _ in os.walk(self.root):
            self.names[os.stat(path).st_ino] = self._listing(path)
            for entry in os.scandir(path):
                if entry.is_file(follow_symlinks=False):
                    self.files[entry.inode()] = content(entry.path)
        monkeypatch.setattr(files, "sync", self.sync)
        monkeypatch.setattr(files, "_sync_directory", self.sync_directory)
        for name in ("rename", "remove"):
            monkeypatch.setattr(files, name, self._announced(getattr(files, name)))

    def _announced(self, function):
        def call(*arguments):
            self.on_call()
            return function(*arguments)

        return call

    def _listing(self, path):
        listing = {}
        for entry in os.scandir(path):
            found = entry.stat(follow_symlinks=False)
            listing[entry.name] = found.st_ino
            self.is_directory[found.st_ino] = stat.S_ISDIR(found.st_mode)
        return listing

    def sync(self, descriptor, path):
        self.on_call()
        found = os.fstat(descriptor)
        self.files[found.st_ino] = os.pread(descriptor, found.st_size, 0)
        self.on_call()

    def sync_directory(self, path):
        self.on_call()
        self.names[os.stat(path).st_ino] = self._listing(path)
        self.on_call()

    def cut(self, target, dice, keep=None):
        """Write one state that a power cut could leave now to the directory `target`."""
        keep = dice.choice((0.0, 0.1, 0.5, 0.9, 1.0)) if keep is None else keep
        live = {}
        for path, _, names in os.walk(self.root):
            for name in names:
                full = os.path.join(path, name)
                live[os.stat(full).st_ino] = full
        self._restore(os.stat(self.root).st_ino, Path(target), live, keep, dice)

    def _restore(self, inode, target, live, keep, dice):
        target.mkdir(mode=0o700)
        synced = self.names.get(inode, {})
        current = self._current_names(inode)
        listing = synced if current is None or dice.random() >= keep else current
        for name, child in listing.items():
            if self.is_directory[child]:
                self._restore(child, target / name, live, keep, dice)
            else:
                data = self._pages(self.files.get(child, b""), live.get(child), keep, dice)
                path = target / name
                path.write_bytes(data)
                path.chmod(0o600)

    def _current_names(self, inode):
        for path, _, _ in os.walk(self.root):
            if os.stat(path).st_ino == inode:
                return self._listing(path)
        return None

    def _pages(self, synced, path, keep, dice):
        if path is None:
            return synced
        now = content(path)
        if now == synced:
            return synced
        if len(synced) != len(now):
            synced = synced.ljust(len(now), b"\0") if dice.random() < keep else synced
        data = bytearray(synced)
        unit = self.unit
        for at in range(0, len(data), unit):
            page = now[at : at + unit]
            if data[at : at + unit] != page and dice.random() < keep:
                data[at : at + unit] = page[: len(data) - at]
        return bytes(data)
