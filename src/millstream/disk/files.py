"""Every call to the file system, and nothing else.

The fault injector of the tests stands in for this module.

A `Path` names what belongs to a store. It is reached from the directory that the store joined,
which is held open: it stays the same when the directory is moved and another one takes its name.

Files are created 0600 and directories 0700 whatever the umask. Nothing follows a symbolic link
below the store's directory. Every failure is a `StorageError` that names the file; no room is
`StoreFull`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from time import monotonic, sleep

from millstream import _native
from millstream.errors import (
    Closed,
    CorruptBatch,
    InvalidArgument,
    InvalidType,
    LockTimeout,
    NotFound,
    StorageError,
    StoreFull,
    Unsupported,
    VersionMismatch,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# l_type, l_whence, l_start, l_len, l_pid; pid must be 0 for OFD locks
FLOCK = struct.Struct("hhqqi4x")
FORMAT = 1
PAGE = 4096
LIVE, DROPPED, REPLACED, OUTGROWN = 1, 2, 3, 4
"""State of what processes share: in use; removed; another file has its place; hints of a queue for
which its capacity is too large by now."""
LEFT = "dropped"
"""What the configuration of a stream or queue is called where the rest is being removed."""
DELETED = " (deleted)"  # how /proc ends the path of what has none any more
LOST_AND_FOUND = "lost+found"  # what a fresh ext file system has at its root

REMOVALS_MOST = 100  # passes over a directory in which others make files
PROBE_BYTES = 1 << 16  # the largest block of XFS: what shares blocks shares whole ones

LOCAL = ("ext4", "f2fs", "overlay", "tmpfs", "xfs")
COPY_ON_WRITE = ("bcachefs", "btrfs", "zfs")
# f_type of statfs(2), from linux/magic.h; ext2 and ext3 say what ext4 does
FILE_SYSTEMS = {
    0x0000EF53: "ext4",
    0x00006969: "nfs",
    0x01021994: "tmpfs",
    0x01021997: "9p",
    0x2FC12FC1: "zfs",
    0x58465342: "xfs",
    0x65735546: "fuse",
    0x794C7630: "overlay",
    0x9123683E: "btrfs",
    0xCA451A4E: "bcachefs",
    0xF2F52010: "f2fs",
    0xFE534D42: "cifs",
    0xFF534D42: "cifs",
}


def storage_error(error: OSError, path: str, doing: str) -> StorageError:
    """Raise an OSError as ours, with the file, what was tried, and what to do."""
    kind = StoreFull if error.errno in FULL else StorageError
    advice = "; free some room and try again, nothing stored is lost" if kind is StoreFull else ""
    if error.errno == errno.EFBIG:
        advice = "; raise the limit of a file's size (ulimit -f) and try again"
    if error.errno == errno.EMFILE:
        advice = "; raise the limit of open files (ulimit -n) or open fewer stores"
    text = f"{doing} failed: {os.strerror(error.errno or 0)}{advice}"
    return kind(error.errno or 0, text, path)


class reporting:
    """Report what the block raises as `StorageError` with path and purpose.

    No generator: one that raises is in a cycle with the frames of all its callers in Python 3.12
    and early 3.13, and a closed store would keep its files open until the collector runs.
    """

    __slots__ = ("doing", "path")

    def __init__(self, path: str, doing: str) -> None:
        self.path = path
        self.doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            if error.errno == errno.ENOENT:
                _refuse_dropped(self.path)
            raise storage_error(error, self.path, self.doing) from error


# --- where things are -----------------------------------------------------------------------------


Held = _native.Held

ANYWHERE = Held(-1)
"""For paths that a caller gave: from the root, or from the working directory."""


class Directory:
    """A directory that is held open.

    What is reached from it belongs to it, and not to another that has its name meanwhile.
    """

    def __init__(self, path: str, *, follow: bool = False) -> None:
        self.text = str(path)
        self._within = isinstance(path, Path)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        with reporting(path, "opening the directory"):
            below, held = _where(path)
            try:
                number = os.open(below, flags, dir_fd=held.number)
            except (FileNotFoundError, NotADirectoryError) as error:
                if not follow and isinstance(error, NotADirectoryError):
                    raise  # something was put in its place
                raise NotFound(f"{path}: there is no such directory") from error
        self._held: Held | None = Held(number)
        found = os.fstat(number)
        self.identity = found.st_dev, found.st_ino

    @property
    def path(self) -> Path:
        """The directory itself; with ``/`` what is in it."""
        return Path(self, ".")

    def held(self) -> Held:
        """Its descriptor. Raises: Closed."""
        held = self._held
        if held is None:
            raise Closed(f"{self.text}: is closed; open the store again")
        return held

    @property
    def was_dropped(self) -> bool:
        """Was it a stream's or a queue's, which was dropped meanwhile?"""
        held = self._held
        if held is None or not self._within:
            return False
        with contextlib.suppress(OSError):
            now = os.path.basename(os.readlink(f"/proc/self/fd/{held.number}"))
            if now.endswith(DELETED) or (now.startswith(".") and now.endswith(".dropped")):
                return True
            os.stat(LEFT, dir_fd=held.number)
            return True
        return False

    def close(self) -> None:
        """Let go of the directory: whoever still has a `Path` below it gets `Closed`."""
        self._held = None


def _refuse_dropped(path: str) -> None:
    """Raise `Closed` where a file is missing because its stream or queue was dropped."""
    if isinstance(path, Path) and path.directory.was_dropped:
        raise Closed(f"{path.directory.text}: was dropped")


class Spare:
    """Descriptors kept for the call that says how things are: `with spare:` lets go of them.

    Only where none is left. Another thread may be quicker to take them.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._held = self._more()

    def _more(self) -> list[Held]:
        """Two descriptors, as a listing takes; []: there are no two."""
        with contextlib.suppress(OSError, Closed):
            number = self._directory.held().number
            return [Held(os.dup(number)) for _ in range(2)] if number is not None else []
        return []

    def __enter__(self) -> None:
        if not self._more():
            self._held = []

    def __exit__(self, *raised: object) -> None:
        self._held = self._held or self._more()

    def close(self) -> None:
        """Close them."""
        self._held = []


class Path(str):
    """A name below a directory that is held open. As text it is what a user would call it."""

    __slots__ = ("below", "directory")

    directory: Directory
    below: str

    def __new__(cls, directory: Directory, below: str) -> Path:
        """Put it together."""
        text = directory.text if below == "." else os.path.join(directory.text, below)
        path = super().__new__(cls, text)
        path.directory, path.below = directory, below
        return path

    def __truediv__(self, name: str) -> Path:
        return Path(self.directory, name if self.below == "." else f"{self.below}/{name}")

    def __add__(self, suffix: str) -> Path:
        return Path(self.directory, self.below + suffix)

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (str(self),))  # in another process it is text

    @property
    def parent(self) -> Path:
        """The directory that it is in, which is never above the one that is held open."""
        return Path(self.directory, os.path.dirname(self.below) or ".")

    @property
    def name(self) -> str:
        """The last part of it."""
        return os.path.basename(self)


def _where(path: str) -> tuple[str, Held]:
    """(name, directory) for the kernel; keep the directory until the call has returned."""
    if isinstance(path, Path):
        return path.below, path.directory.held()
    return path, ANYWHERE


def _parent(path: str) -> str:
    return path.parent if isinstance(path, Path) else os.path.dirname(path)


def _stat(path: str) -> os.stat_result:
    below, held = _where(path)
    return os.stat(below, dir_fd=held.number, follow_symlinks=False)


def absolute(path: str | os.PathLike[str]) -> str:
    """Check a path that a caller gave."""
    try:
        directory = os.path.abspath(os.fsdecode(os.fspath(path)))
        os.fsencode(directory)
    except TypeError as error:
        raise InvalidType(f"path {path!r}: expected str or os.PathLike") from error
    except FileNotFoundError as error:
        raise NotFound(
            f"path {path!r}: the working directory, from which it goes, was removed"
        ) from error
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"path {path!r}: {error}") from error
    if not os.fspath(path):
        raise InvalidArgument("path: is empty")
    if "\0" in directory:
        raise InvalidArgument(f"path {directory!r}: has a NUL character")
    return directory


# --- directories ----------------------------------------------------------------------------------


def make_directory(path: Path) -> None:
    """Create a directory 0700 unless it is there, and sync its parent."""
    _make_directory(path)
    sync_directory(path.parent)


def _make_directory(path: str) -> bool:
    with reporting(path, "creating the directory"):
        below, held = _where(path)
        try:
            os.mkdir(below, 0o700, dir_fd=held.number)
        except FileExistsError:
            if not stat.S_ISDIR(_stat(path).st_mode):
                raise StorageError(errno.ENOTDIR, "is there and is not a directory", path) from None
            return False
        os.chmod(below, 0o700, dir_fd=held.number)
        return True


def make_directories(path: str) -> None:
    """Create the directory that a caller asks for, and those above it that are missing, 0700."""
    if not os.path.isdir(path):
        make_directories(os.path.dirname(path))
        _make_directory(path)
        _sync_directory(os.path.dirname(path))


def make_target(path: str) -> bool:
    """Create one directory that a caller asks for, 0700; False: it was there."""
    made = _make_directory(path)
    _sync_directory(os.path.dirname(path))
    return made


def lies_in(path: str, directory: Directory) -> bool:
    """Would a directory at `path` lie within this one, wherever that was moved to?"""
    above = os.path.realpath(path)
    while (above := os.path.dirname(above)) != "/":
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(above)
            if (found.st_dev, found.st_ino) == directory.identity:
                return True
    return False


def require_directory(path: Path) -> None:
    """Refuse what is no directory where ours should be, a link for instance; nothing is fine."""
    with reporting(path, "searching for the directory"), contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(_stat(path).st_mode):
            raise StorageError(
                errno.ENOTDIR, "expected a directory; remove what was put there", path
            )


def sync_directory(path: Path) -> None:
    """Make the entries of a directory survive a power cut."""
    _sync_directory(path)


def _sync_directory(path: str) -> None:
    with reporting(path, "syncing the directory"):
        descriptor = _open_directory(path)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_directory(path: Path) -> int:
    """Another descriptor of a directory."""
    with reporting(path, "opening the directory"):
        return _open_directory(path)


def mode(path: Path) -> int:
    """Its kind and permissions."""
    with reporting(path, "reading its permissions"):
        return _stat(path).st_mode


def _open_directory(path: str) -> int:
    below, held = _where(path)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return os.open(below, flags, dir_fd=held.number)


def names(path: Path) -> list[str]:
    """List a directory; empty when there is none."""
    with reporting(path, "listing the directory"):
        try:
            descriptor = _open_directory(path)
        except FileNotFoundError:
            return []
        try:
            return os.listdir(descriptor)
        finally:
            os.close(descriptor)


def names_with(path: str, file: str) -> list[str]:
    """Names in a user's directory in which there is a `file`; none where it may not be read."""
    try:
        return sorted(one for one in os.listdir(path) if os.path.lexists(f"{path}/{one}/{file}"))
    except OSError:
        return []


def exists(path: Path) -> bool:
    """Is there anything of that name?"""
    with reporting(path, "searching for it"):
        try:
            _stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def remove(path: Path) -> None:
    """Unlink a file; one that is gone already is fine."""
    with reporting(path, "removing the file"), contextlib.suppress(FileNotFoundError):
        below, held = _where(path)
        os.unlink(below, dir_fd=held.number)


def rename(path: Path, target: Path) -> None:
    """Rename within a directory tree. The caller syncs the directory."""
    with reporting(path, f"renaming to {target}"):
        (old, source), (new, destination) = _where(path), _where(target)
        os.rename(old, new, src_dir_fd=source.number, dst_dir_fd=destination.number)


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it, without following links.

    Others, who have it open, may remove files of it meanwhile, or make a few.
    """
    below, held = _where(path)
    for left in reversed(range(REMOVALS_MOST)):
        _empty(path)
        with reporting(path, "removing the directory"), contextlib.suppress(FileNotFoundError):
            try:
                os.rmdir(below, dir_fd=held.number)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or left == 0:
                    raise
                continue
        return


def remove_whole(directory: Directory, name: str = "", *, last: str = "") -> None:
    """Remove a directory that is held open, and all in it; what has its name meanwhile stays.

    `name` is a path of it, if it has another than it was opened by; `last` the file that goes after
    all others.
    """
    _empty(directory.path, but=last)
    _empty(directory.path)
    path = name or directory.text
    with reporting(path, "removing the directory"), contextlib.suppress(FileNotFoundError):
        if is_at(directory, path):
            below, held = _where(path)
            os.rmdir(below, dir_fd=held.number)


def is_at(directory: Directory, path: str) -> bool:
    """Has the directory that is held open this name now?"""
    with reporting(path, "searching for it"), contextlib.suppress(FileNotFoundError):
        found = _stat(path)
        return (found.st_dev, found.st_ino) == directory.identity
    return False


def remove_any(path: Path) -> None:
    """Remove a file, or a directory and all below it; what is gone already is fine."""
    with reporting(path, "searching for it"), contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(_stat(path).st_mode):
            remove_tree(path)
        else:
            remove(path)


def _empty(path: Path, *, but: str = "") -> None:
    for name in names(path):
        if name != but:
            remove_any(path / name)


def file_system(path: str) -> str:
    """Name of the file system that a path lies on: asked of itself, whatever its mount is called.

    The name of a kind that is not known here comes from the kernel's mount table.
    """
    with reporting(path, "asking for its file system"):
        below, held = _where(path)
        descriptor = os.open(below, os.O_PATH | os.O_CLOEXEC, dir_fd=held.number)
        try:
            found = FILE_SYSTEMS.get(_native.file_system_magic(descriptor))
            return found or _mounted_as(descriptor)
        finally:
            os.close(descriptor)


def _mounted_as(descriptor: int) -> str:
    """What the mount table calls the file system of an open file; "unknown" if it is not there.

    The table is bytes: names in it may be in any encoding, or none.
    """
    with contextlib.suppress(FileNotFoundError):  # no /proc here
        with open(f"/proc/self/fdinfo/{descriptor}", "rb") as facts:
            numbers = [line.split()[1] for line in facts if line.startswith(b"mnt_id:")]
        with open("/proc/self/mountinfo", "rb") as table:
            for line in table:
                before, _, after = line.partition(b" - ")
                if before.split()[:1] == numbers:
                    return after.split()[0].decode("ascii", "backslashreplace")
    return "unknown"


def check_file_system(path: Path, *, force: bool) -> str:
    """Refuse file systems on which a shared mapping cannot keep what is promised; its name."""
    kind = file_system(path)
    if kind in LOCAL or force:
        return kind
    if kind in COPY_ON_WRITE:
        raise _copies_on_write(path, kind)
    raise Unsupported(
        f"{path}: the file system {kind} is not known to keep shared mappings and locks coherent"
        " (network file systems do not); put the store on a local ext4, xfs or tmpfs, or pass"
        " force=True"
    )


def check_upper_layer(path: Path) -> None:
    """Refuse an overlay whose upper layer copies on write.

    An overlay does not name that layer (in a container its path leads nowhere), so a file in it is
    asked: either it has no blocks when it is allocated (ZFS), or it can share blocks and not take
    that back (Btrfs, bcachefs), which XFS can.
    """
    probe = path / f"probe.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    descriptor = open_file(probe, write=True, create=True)
    try:
        remove(probe)
        allocate(descriptor, 2 * PROBE_BYTES, probe)
        allocated = os.fstat(descriptor).st_blocks * 512
        if allocated < 2 * PROBE_BYTES or _native.copies_on_write(descriptor, PROBE_BYTES):
            raise _copies_on_write(path, "the upper layer of this overlay")
    finally:
        os.close(descriptor)


def _copies_on_write(path: Path, what: str) -> Unsupported:
    return Unsupported(
        f"{path}: {what} copies on write, so a store into allocated space can fail with SIGBUS; put"
        " the store on ext4, xfs or tmpfs, or pass force=True"
    )


# --- files ----------------------------------------------------------------------------------------


def open_file(path: Path, *, write: bool, create: bool = False) -> int:
    """Open a regular file of ours without following a link; refuse anything else planted there."""
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    if create:
        flags |= os.O_CREAT | os.O_EXCL
    with reporting(path, "opening the file"):
        below, held = _where(path)
        try:
            descriptor = os.open(below, flags, 0o600, dir_fd=held.number)
        except FileNotFoundError as error:
            _refuse_dropped(path)
            raise NotFound(f"{path}: there is no such file", path=str(path)) from error
    try:
        with reporting(path, "opening the file"):
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise StorageError(
                    errno.EINVAL, "expected a regular file; remove what was put there", path
                )
            try:
                ours = (os.geteuid(), 0, _stat(_parent(path)).st_uid)
            except FileNotFoundError as error:  # both went meanwhile
                _refuse_dropped(path)
                raise NotFound(f"{path}: there is no such file", path=str(path)) from error
            if found.st_uid not in ours:
                raise StorageError(
                    errno.EPERM,
                    f"belongs to user {found.st_uid}, expected {ours[0]}, 0 or the directory's"
                    f" owner {ours[2]}; give it to one of these, or remove what was put there",
                    path,
                )
            if found.st_nlink > 1 and _is_linked_elsewhere(descriptor, path):
                raise StorageError(
                    errno.EMLINK,
                    f"has {found.st_nlink} names: a snapshot by hard links (cp -al) shares it, so"
                    " what is written in one of them changes the other; remove the other names, or"
                    " make one of the two directories a copy of its own (cp -a), and take snapshots"
                    " with `millstream backup`",
                    path,
                )
            if create:
                os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_linked_elsewhere(descriptor: int, path: Path) -> bool:
    """Has the file other names than those that we give it?

    Beside its own these are ``NAME.*``, while it is made or repaired.
    """
    for _ in range(3):  # a name may come or go meanwhile
        found = os.fstat(descriptor)
        ours = 0
        for name in names(path.parent):
            if name.startswith(path.name):
                ours += inode(path.parent / name) == found.st_ino
        if ours >= found.st_nlink:
            return False
    return True


def close(descriptor: int) -> None:
    """Close a descriptor."""
    os.close(descriptor)


def size(descriptor: int) -> int:
    """Size of an open file in bytes."""
    return os.fstat(descriptor).st_size


def allocated_bytes(path: Path) -> int:
    """Bytes of disk that a file takes; 0 when it is gone."""
    with reporting(path, "reading its size"), contextlib.suppress(FileNotFoundError):
        return _stat(path).st_blocks * 512
    return 0


def inode(target: Path | int) -> int:
    """Number of the file behind a path or a descriptor; 0 when it is gone."""
    if isinstance(target, int):
        return os.fstat(target).st_ino
    with reporting(target, "searching for it"), contextlib.suppress(FileNotFoundError):
        return _stat(target).st_ino
    return 0


def boot() -> str:
    """Which boot of the machine this is."""
    with (
        reporting("/proc/sys/kernel/random/boot_id", "reading it"),
        open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file,
    ):
        return file.read().strip()


def pid_namespace() -> int:
    """Number of the namespace that the ids of processes are of; 0: not known, without /proc."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def free_bytes(path: Path) -> int:
    """Bytes of the file system that this user may still fill."""
    with reporting(path, "asking how much is free"):
        descriptor = _open_directory(path)
        try:
            found = os.statvfs(descriptor)
        finally:
            os.close(descriptor)
    return found.f_bavail * found.f_frsize


def allocate(descriptor: int, length: int, path: str) -> None:
    """Put blocks behind the first `length` bytes: storing there through a map cannot fail.

    Where they are there already nothing is asked for: XFS wants as many free ones even so, which a
    full disk does not have.
    """
    with reporting(path, f"allocating {length} bytes"):
        if os.fstat(descriptor).st_size < length or not _native.has_blocks(descriptor, length):
            os.posix_fallocate(descriptor, 0, length)


def extend(descriptor: int, length: int, path: str) -> None:
    """Make a file that nobody else has yet as long as this, with a hole at its end."""
    with reporting(path, "extending the file"):
        os.ftruncate(descriptor, length)


def data_end(path: Path) -> int:
    """The byte behind the last that was ever written: what is allocated behind it reads as zeros.

    Reading there would fault in, and so take memory for, pages that nobody has used.
    """
    descriptor = open_file(path, write=False)
    try:
        end, size = 0, os.fstat(descriptor).st_size
        while end < size:
            try:
                end = os.lseek(descriptor, os.lseek(descriptor, end, os.SEEK_DATA), os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise storage_error(error, path, "searching for data") from error
                break
        return end
    finally:
        os.close(descriptor)


def map_file(descriptor: int, length: int, path: str, *, write: bool) -> _native.Map:
    """Map a file shared. The map needs no descriptor.

    To write: blocks that it shares with a copy (a reflink: what `cp` makes on XFS) become its own.
    Each store into one would need another, and fail as SIGBUS where the disk is full.
    """
    if write:
        with reporting(path, "giving it blocks of its own (it shares some with a copy)"):
            _native.unshare(descriptor)
    with reporting(path, "mapping the file"):
        if os.fstat(descriptor).st_size < length:
            raise CorruptBatch(
                f"{path}: shorter than it was made, {os.fstat(descriptor).st_size} of {length}"
                " bytes",
                path=path,
                expected=length,
                found=os.fstat(descriptor).st_size,
            )
        if length == 0:
            raise CorruptBatch(
                f"{path}: empty, but it was made with its header; see `millstream verify`",
                path=path,
                found=0,
            )
        return _native.Map(descriptor, length, write)


def read(descriptor: int, length: int, position: int, path: str) -> bytes:
    """Read up to `length` bytes."""
    with reporting(path, "reading the file"):
        return os.pread(descriptor, length, position)


def content(path: Path) -> bytes:
    """All bytes of a file; NotFound where there is none."""
    descriptor = open_file(path, write=False)
    try:
        data, length = b"", size(descriptor)
        while len(data) < length:
            more = read(descriptor, length - len(data), len(data), path)
            if not more:
                break
            data += more
        return data
    finally:
        close(descriptor)


def write(descriptor: int, data: bytes | memoryview, position: int, path: str) -> None:
    """Write all of `data`."""
    view = memoryview(data)
    with reporting(path, "writing the file"):
        while view:
            written = os.pwrite(descriptor, view, position)
            view, position = view[written:], position + written


def sync(descriptor: int, path: str) -> None:
    """Make the content of a file survive a power cut.

    Never retry it when it failed: the kernel calls the pages clean by then.
    """
    with reporting(path, "syncing the file"):
        os.fdatasync(descriptor)


def make(path: Path, length: int, header: bytes) -> bool:
    """Create a file of allocated zeros behind a header and publish it whole, durably.

    False: somebody else published one under that name meanwhile; theirs stays.
    """
    temporary = path + f".{os.getpid()}-{os.urandom(4).hex()}.tmp"
    descriptor = open_file(temporary, write=True, create=True)
    try:
        allocate(descriptor, length, path)
        write(descriptor, header, 0, path)
        sync(descriptor, path)
        with reporting(path, "publishing the file"):
            (old, source), (new, destination) = _where(temporary), _where(path)
            try:
                os.link(
                    old, new, src_dir_fd=source.number, dst_dir_fd=destination.number,
                    follow_symlinks=False,
                )  # fmt: skip
            except FileExistsError:
                return False
    finally:
        os.close(descriptor)
        remove(temporary)
    _sync_directory(_parent(path))
    return True


def replace(path: Path, data: bytes, *, length: int = 0) -> None:
    """Replace a file whole: after a kill or a power cut it is the old one or the new one."""
    temporary = path + f".{os.getpid()}-{os.urandom(4).hex()}.tmp"
    descriptor = open_file(temporary, write=True, create=True)
    try:
        if length:
            allocate(descriptor, length, path)
        write(descriptor, data, 0, path)
        sync(descriptor, path)
        rename(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(descriptor)
    _sync_directory(_parent(path))


def _canonical(body: dict[str, Any]) -> bytes:
    with _native.loading:
        import json
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Replace a JSON file with its checksum."""
    with _native.loading:
        import json
    checksum = f"{_native.xxh3_64(_canonical(body)):016x}"
    text = json.dumps({"body": body, "checksum": checksum}, sort_keys=True, indent=1)
    replace(path, text.encode("ascii") + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file and hold it to its checksum and format."""
    with _native.loading:
        import json
    descriptor = open_file(path, write=False)
    try:
        data = read(descriptor, 1 << 20, 0, path)
    finally:
        os.close(descriptor)
    try:
        document = json.loads(data)
        body, checksum = document["body"], document["checksum"]
        found = f"{_native.xxh3_64(_canonical(body)):016x}"
        version = body["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptBatch(
            f"{path}: not a configuration file of millstream: {error}", path=path
        ) from error
    if found != checksum:
        raise CorruptBatch(
            f"{path}: its checksum is wrong", path=path, expected=checksum, found=found
        )
    if version != FORMAT:
        raise VersionMismatch(
            f"{path}: format {version}, this version of millstream reads format {FORMAT}"
        )
    return dict(body)


# --- who else there is ----------------------------------------------------------------------------


def command_of(pid: int) -> str:
    """The command line of a process, in one line; empty where it may not be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    return " ".join(b" ".join(words).decode("utf-8", "backslashreplace").split())


# --- locked bytes: gone with the process, whoever kills it ----------------------------------------


def _lock(descriptor: int, kind: int, start: int, length: int, *, command: int) -> bytes:
    return fcntl.fcntl(descriptor, command, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def try_lock(descriptor: int, start: int, *, shared: bool = False) -> bool:
    """Lock one byte for this open file description; False when another holds it."""
    try:
        _lock(
            descriptor,
            fcntl.F_RDLCK if shared else fcntl.F_WRLCK,
            start,
            1,
            command=fcntl.F_OFD_SETLK,
        )
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock(descriptor: int, start: int) -> None:
    """Give a locked byte back."""
    _native.unlock_byte(descriptor, start)


def is_locked(descriptor: int, start: int, length: int = 1) -> bool:
    """Does another open file description hold a lock in the range? Its own locks do not count."""
    answer = _lock(descriptor, fcntl.F_RDLCK, start, length, command=fcntl.F_OFD_GETLK)
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def lock(descriptor: int, start: int, path: str, *, timeout: float, shared: bool = False) -> None:
    """Lock one byte; `LockTimeout` when another holds it for longer than `timeout` seconds."""
    deadline = monotonic() + timeout
    pause = 0.0005
    while not try_lock(descriptor, start, shared=shared):
        if monotonic() >= deadline:
            raise LockTimeout(
                f"{path}: another process holds the lock of byte {start} for {timeout:g} s; is one"
                " stopped while opening the store, or registering a producer?"
            )
        sleep(pause)
        pause = min(pause * 1.5, 0.02)
