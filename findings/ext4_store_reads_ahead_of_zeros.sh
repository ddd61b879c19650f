#!/usr/bin/env bash
# ext4, Linux 6.18: one byte stored through a map of allocated, never written blocks fills the page cache around it.
#
# Guess: nothing is there to be read, so the fault makes one page of zeros.
# Seen: as many pages as the device reads ahead (2,048 with its 8 MiB here), each zeroed within that one fault, and small. A
# later write of 512 KiB beside it finds some of them, and so makes no large folio, which one fault would map whole: 128
# faults instead of 1. After MADV_RANDOM: one page, and one fault. `posix_fadvise` on the descriptor changes nothing: maps
# do not ask it. (Large folios: ext4 since Linux 6.16.)
#
# What follows: who fills files ahead by large writes maps them with MADV_RANDOM before the first store.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
uname -r
[ "$(stat -f -c %T "$folder")" = ext2/ext3 ] || { echo "needs ext4 under ${TMPDIR:-/tmp}"; exit 2; }
python3 - "$folder/file" <<'END'
import ctypes, mmap, os, resource, sys

libc = ctypes.CDLL(None, use_errno=True)
SIZE, CHUNK = 64 << 20, 512 << 10
AT = 32 * CHUNK - 4096  # the last page before what is written


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def run(advice):
    descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(descriptor, 0, SIZE)
    os.fsync(descriptor)
    memory = mmap.mmap(descriptor, SIZE)
    if advice == "fadvise":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    elif advice == "madvise":
        memory.madvise(mmap.MADV_RANDOM)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[AT] = 1
    resident = (ctypes.c_ubyte * (SIZE // 4096))()
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(SIZE), resident):
        raise OSError(ctypes.get_errno(), "mincore")
    pages = sum(one & 1 for one in resident)
    os.pwrite(descriptor, bytes(CHUNK), 32 * CHUNK)
    before = faults()
    for at in range(32 * CHUNK, 33 * CHUNK, 4096):
        memory[at] = 1
    return pages, faults() - before


for advice in ("none", "fadvise", "madvise"):
    pages, count = run(advice)
    print(f"{advice}: {pages} pages after one store, {count} faults over 512 KiB written at once")
    if (advice == "madvise") != (pages == 1) or (advice == "madvise") != (count <= 2):
        sys.exit("that is not what was seen")
END
