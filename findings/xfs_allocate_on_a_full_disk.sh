#!/usr/bin/env bash
# XFS: allocating what is allocated already fails on a full disk.
#
# Guess: posix_fallocate() over a range that has its blocks changes nothing, so it cannot fail for want of room.
# Seen (Linux 6.18): on ext4 and tmpfs it does not. On XFS it is ENOSPC: as many free blocks are asked for as the range is
# long, before anybody looks whether it has some. Stores into the range go on to work.
# So whoever allocates to be sure looks first (FIEMAP lists unwritten extents too; SEEK_HOLE calls them holes).
#
# Needs root (mounts in a namespace of its own), unshare, mkfs.xfs, mkfs.ext4 and python3. Ends with 0 while that is so, 1
# when it changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
uname -sr
unshare --mount bash -euo pipefail -s "$scratch" <<'IN'
cd "$1"
truncate -s 330M image.xfs image.ext4
mkfs.xfs -q image.xfs
mkfs.ext4 -q image.ext4
mkdir xfs ext4 tmpfs
mount -o loop image.xfs xfs
mount -o loop image.ext4 ext4
mount -t tmpfs -o size=20m tmpfs tmpfs
python3 - <<'PY'
import errno, mmap, os, sys
seen = {}
for kind in ("xfs", "ext4", "tmpfs"):
    file = os.open(f"{kind}/file", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(file, 0, 8 << 20)
    os.fsync(file)
    for size in (1 << 20, 4096):
        ballast = os.open(f"{kind}/ballast{size}", os.O_WRONLY | os.O_CREAT)
        try:
            while os.write(ballast, os.urandom(size)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.sync()
    try:
        os.posix_fallocate(file, 0, 8 << 20)
        seen[kind] = "done"
    except OSError as error:
        seen[kind] = errno.errorcode[error.errno]
    with mmap.mmap(file, 8 << 20) as stored:
        stored[:] = b"x" * (8 << 20)
        stored.flush()
    print(f"{kind}: allocating again: {seen[kind]}; storing there: done")
sys.exit(seen != {"xfs": "ENOSPC", "ext4": "done", "tmpfs": "done"})
PY
IN
