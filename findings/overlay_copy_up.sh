#!/usr/bin/env bash
# Overlay file system: two answers through one descriptor, and nothing that tells.
#
# Guess: when a file of the lower layer is copied up (another process opened it to write), a fresh open shows it by
# another device or inode, so a reader can compare them and open again.
# Seen (Linux 6.18, tmpfs below): device, inode and /proc/self/maps stay the same, for the old descriptor and a fresh
# one. pread() through the OLD descriptor returns the new bytes, while a map of that descriptor, the one from before as
# well as a new one, shows the old ones for ever. Only a map of a fresh open has the new bytes.
# So whoever maps files compares contents; what only rises, and was read before the map, must not be above the map.
#
# Needs root (mounts in a namespace of its own), unshare and python3. Ends with 0 while that is so, 1 when it changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
uname -sr
unshare --mount bash -euo pipefail -s "$scratch" <<'IN'
cd "$1"
mkdir lower layer merged
printf 'old.' > lower/file
mount -t tmpfs layer layer
mkdir layer/upper layer/work
mount -t overlay -o "lowerdir=$1/lower,upperdir=$1/layer/upper,workdir=$1/layer/work" overlay merged
python3 - merged/file <<'PY'
import mmap, os, sys
path = sys.argv[1]
old = os.open(path, os.O_RDONLY)
shown = mmap.mmap(old, 4, access=mmap.ACCESS_READ)
before = os.fstat(old)
with open(path, "r+b") as writer:  # copies it up
    writer.write(b"new.")
fresh = os.open(path, os.O_RDONLY)
identities = {(found.st_dev, found.st_ino) for found in (before, os.fstat(old), os.fstat(fresh))}
seen = {
    "identities": len(identities),
    "pread of the old descriptor": os.pread(old, 4, 0),
    "map from before": shown[:],
    "new map of the old descriptor": mmap.mmap(old, 4, access=mmap.ACCESS_READ)[:],
    "map of a fresh open": mmap.mmap(fresh, 4, access=mmap.ACCESS_READ)[:],
}
for what, found in seen.items():
    print(f"{what}: {found}")
sys.exit(list(seen.values()) != [1, b"new.", b"old.", b"old.", b"new."])
PY
IN
