# ms_platform.h and ms_xxh3.h
from libc.errno cimport errno

cdef extern from "ms_platform.h" nogil:
    void ms_clock_set(cbool is_virtual, int64_t skew_ns, int64_t set_ns)
    int ms_file_system(int descriptor, uint32_t *magic)
    cbool ms_has_blocks(int descriptor, uint64_t length)
    int ms_unshare(int descriptor)
    cbool ms_can_share(int descriptor, uint64_t block)
    cbool ms_can_unshare(int descriptor, uint64_t block)
cdef extern from "<fcntl.h>" nogil:
    struct flock:
        short l_type
        short l_whence
        int64_t l_start
        int64_t l_len
        int l_pid
    int control "fcntl"(int descriptor, int command, flock *lock)
    int duplicate_descriptor "fcntl"(int descriptor, int command, int least)
    enum:
        F_DUPFD_CLOEXEC
        F_UNLCK
        F_OFD_SETLK
cdef extern from "<stdio.h>" nogil:
    enum:
        SEEK_SET
cdef extern from "<string.h>" nogil:
    char *strerror(int error)
cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_ANONYMOUS
        MAP_PRIVATE
        MAP_SHARED
    void *MAP_FAILED
    void *mmap(void *start, size_t length, int access, int kind, int descriptor, int64_t position)
    int munmap(void *start, size_t length)
cdef extern from "<unistd.h>" nogil:
    int close_descriptor "close"(int descriptor)


def xxh3_64(data, uint64_t seed=0):
    """XXH3-64 of bytes-like data, as an int."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return ms_xxh3_64(view.buf, <size_t>view.len, seed)
    finally:
        PyBuffer_Release(&view)


FILL_BYTES = MS_FILL_BYTES


def fork_guard(int descriptor):
    """Close the descriptor in forked children."""
    cdef int error = ms_fork_guard(descriptor)
    if error:
        raise OSError(error, "too many guarded descriptors")


def fork_release(int descriptor):
    """Forget a descriptor before it is closed."""
    ms_fork_release(descriptor)


def fork_count():
    """A number that differs between a process and its forked child."""
    return ms_fork_count()


def file_system_magic(int descriptor):
    """The number that statfs(2) has for the kind of file system that an open file lies on."""
    cdef uint32_t magic = 0
    cdef int error = ms_file_system(descriptor, &magic)
    if error:
        raise OSError(error, "statfs")
    return magic


def has_blocks(int descriptor, uint64_t length):
    """Is there a block of the file system behind each of the first `length` bytes of a file?

    False as well where the file system does not tell.
    """
    cdef cbool found
    with nogil:
        found = ms_has_blocks(descriptor, length)
    return found


def unshare(int descriptor):
    """Give a file blocks of its own where it shares some with a copy (a reflink)."""
    cdef int error
    with nogil:
        error = ms_unshare(descriptor)
    if error:
        raise OSError(error, "unsharing")


def copies_on_write(int descriptor, uint64_t block):
    """Does the file system of a file with two allocated blocks share blocks, and cannot unshare
    them? The second block is lost."""
    return ms_can_share(descriptor, block) and not ms_can_unshare(descriptor, block)


def monotonic_ns():
    """Nanoseconds of CLOCK_MONOTONIC."""
    return ms_clock_monotonic_ns()


def wall_us():
    """Microseconds since 1970."""
    return ms_clock_wall_us()


def boot_us():
    """Microseconds of CLOCK_BOOTTIME."""
    return ms_clock_boot_ns() // 1000


cdef object _virtual_clock = ""
cdef int64_t _ahead_ns = 0
cdef int64_t _wall_ahead_ns = 0


cdef object read_environment():
    """Let the clocks run as `MILLSTREAM_CLOCK` says (millstream.testing)."""
    global _ahead_ns, _wall_ahead_ns
    cdef const char *text = getenv("MILLSTREAM_CLOCK")
    if text == NULL or text[0] == 0:
        return
    try:
        seconds = float(<bytes>text)
    except ValueError:
        seconds = float("nan")
    if not abs(seconds) <= 100 * 365.25 * 86400:
        raise _errors.InvalidArgument(
            f"MILLSTREAM_CLOCK={(<bytes>text).decode('utf-8', 'backslashreplace')!r}: expected "
            "seconds of skew, as in +86400; at most a hundred years")
    if seconds < 0:
        _wall_ahead_ns = round(seconds * 1e9)
    else:
        _ahead_ns = round(seconds * 1e9)
    ms_clock_set(True, _ahead_ns, _wall_ahead_ns)


read_environment()


def set_clock(bint is_virtual, int64_t skew_ns=0, int64_t set_ns=0):
    """Let the clocks of this process run `skew_ns` ahead of the machine's, that of the wall
    `set_ns` more, or end that; in addition to what `MILLSTREAM_CLOCK` says."""
    global _virtual_clock
    if is_virtual != bool(_virtual_clock):
        import os
        _virtual_clock = f"virtual {os.urandom(8).hex()}" if is_virtual else ""
    ms_clock_set(is_virtual or _ahead_ns or _wall_ahead_ns,
                 _ahead_ns + skew_ns, _wall_ahead_ns + set_ns)


def virtual_clock():
    """What tells this virtual clock from others; "": the clocks are the machine's."""
    return _virtual_clock


@cython.final
cdef class Map:
    """Memory of a file, or of this process alone, until the last buffer of it is gone.

    It keeps no descriptor, as `mmap.mmap` does: what has many files mapped would run out of them.
    Nor does the collector of cycles know of it, as it does of a memoryview, which it would try to
    release while there are buffers of it. A slice is a copy.
    """
    cdef void *start
    cdef size_t length
    cdef bint writable

    def __cinit__(self, int descriptor, size_t length, bint writable):
        cdef int access = PROT_READ | PROT_WRITE if writable else PROT_READ
        cdef int kind = MAP_SHARED if descriptor >= 0 else MAP_PRIVATE | MAP_ANONYMOUS
        cdef void *start = mmap(NULL, length, access, kind, descriptor, 0)
        if start == MAP_FAILED:
            raise OSError(errno, strerror(errno).decode())
        self.start, self.length, self.writable = start, length, writable

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.length)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start, <Py_ssize_t>self.length, not self.writable, flags)

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        return memoryview(self)[where].tobytes()

    def __setitem__(self, where, data):
        memoryview(self)[where] = data


def private_memory(size_t length):
    """Page-aligned zeros of this process: what a read-only opener has for a file."""
    return Map(-1, length, True)


def private_copy(bytes data):
    """Such memory with this content."""
    copy = Map(-1, len(data), True)
    copy[:] = data
    return copy


def unlock_byte(int descriptor, int64_t start):
    """Give a locked byte back, without memory: for want of that nobody else would ever get it."""
    cdef flock lock
    memset(&lock, 0, sizeof(lock))
    lock.l_type, lock.l_whence, lock.l_start, lock.l_len = F_UNLCK, SEEK_SET, start, 1
    if control(descriptor, F_OFD_SETLK, &lock) < 0:
        raise OSError(errno, "unlocking")


@cython.final
cdef class Held:
    """A descriptor that is closed with the last reference: a call that is under way keeps it.

    Below 0: none, for paths from the root. The collector of cycles does not know of it, so that it
    is open while finalizers run: `Store.__del__` would go on with a number that is another file's.
    """
    cdef int descriptor

    def __cinit__(self, int descriptor):
        self.descriptor = descriptor

    def __dealloc__(self):
        if self.descriptor >= 0:
            close_descriptor(self.descriptor)

    @property
    def number(self):
        """The descriptor, or None."""
        return self.descriptor if self.descriptor >= 0 else None
