# ms_owner.h: words by number, and long words as context managers
def owner_word(uint32_t index, uint32_t incarnation):
    """The owner word of a member."""
    return ms_owner_word(index, incarnation)


def owner_parts(uint32_t word):
    """(member index, low bits of the incarnation) of an owner word."""
    return ms_owner_index(word & 0x7fffffff), ms_owner_incarnation(word & 0x7fffffff)


@cython.final
cdef class Word:
    """A long owner word: `with word:` holds it. `inherited` says that it came from a dead owner.

    `members` proves deaths (`is_dead(word)`, `describe(word)`, `.word`).
    """
    cdef void *word
    cdef object keep
    cdef readonly object members
    cdef readonly str name
    cdef public double timeout
    cdef readonly bint inherited

    def __enter__(self):
        self.take(self.timeout)
        return self

    def __exit__(self, *exc):
        self.release()

    def try_take(self):
        """Take the word if it is free, or its owner is dead; False otherwise. Never waits."""
        cdef uint32_t owner = 0
        cdef uint32_t me = self.members.word
        # `inherited` is set by who has the word alone: threads that fail leave it as it is.
        if ms_owner_try_take(self.word, me, &owner) == MS_OK:
            self.inherited = False
            return True
        if self.members.is_dead(owner & 0x7fffffff):
            if ms_owner_take_over(self.word, me, owner, &owner) == MS_OK:
                self.inherited = True
                return True
        return False

    def take(self, double timeout):
        """Take the word, waiting at most `timeout` seconds; `LockTimeout` names the holder."""
        cdef uint32_t owner = 0
        cdef uint32_t me = self.members.word
        cdef int64_t deadline = ms_clock_monotonic_ns() + <int64_t>(timeout * 1e9)
        cdef int64_t left
        cdef ms_status status
        while True:
            left = deadline - ms_clock_monotonic_ns()
            with nogil:
                status = ms_owner_wait(self.word, me, left if left > 0 else 0, &owner)
            if status == MS_OK:
                self.inherited = False
                return
            PyErr_CheckSignals()
            if self.members.is_dead(owner):
                if ms_owner_take_over(self.word, me, owner, &owner) == MS_OK:
                    self.inherited = True
                    return
            elif left <= 0:
                raise _errors.LockTimeout(
                    f"{self.name}: held by {self.members.describe(owner)} for {timeout:g} s")

    def release(self):
        """Give the word back."""
        ms_owner_release(self.word)

    @property
    def value(self):
        """What the word holds, without the waiters bit."""
        return ms_load32(self.word) & 0x7fffffff


cdef Word make_word(void *word, object keep, object members, str name, double timeout):
    cdef Word self = Word.__new__(Word)
    self.word = word
    self.keep = keep
    self.members = members
    self.name = name
    self.timeout = timeout
    return self
