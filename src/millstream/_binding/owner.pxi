# ms_owner.h: words by number, and long words as context managers
def owner_word(uint32_t index, uint32_t incarnation):
    """The owner word of a member."""
    return ms_owner_word(index, incarnation)


def owner_parts(uint32_t word):
    """(member index, low bits of the incarnation) of an owner word."""
    return ms_owner_index(word & 0x7fffffff), ms_owner_incarnation(word & 0x7fffffff)


@cython.final
cdef class Word(_Taken):
    """A long owner word: `with word:` holds it. `inherited` says that it came from a dead owner.

    `members` proves deaths (`is_dead(word)`, `describe(word)`, `.word`). To take it in the middle
    of a call that has it raises `Reentered`.
    """
    cdef void *word
    cdef object keep
    cdef _Seat seat
    cdef readonly object members
    cdef readonly str name
    cdef public double timeout

    cdef inline void sit(self, uint32_t me, bint inherited) noexcept:
        self.seat.members = self.members
        self.seat.sit(me, inherited)

    cdef int take_it(self) except -1:
        self.take(self.timeout)
        return 0

    cdef int give_back(self, error) except -1:
        self.release()
        return 0

    @property
    def inherited(self):
        """Did the holder of now take it from a dead owner?"""
        return self.seat.inherited

    @property
    def mine(self):
        """Does this thread have it?"""
        return self.seat.is_mine(ms_load32(self.word) & 0x7fffffff)

    def try_take(self):
        """Take the word if it is free, or its owner is dead; False otherwise. Never waits."""
        cdef uint32_t owner = 0
        cdef uint32_t me = self.members.word
        must_write(me != 0, self.name)
        if ms_owner_try_take(self.word, me, &owner) == MS_OK:
            self.sit(me, False)
            return True
        if self.members.is_dead(owner & 0x7fffffff):
            if ms_owner_take_over(self.word, me, owner, &owner) == MS_OK:
                self.sit(me, True)
                return True
        return False

    def take(self, double timeout):
        """Take the word, waiting at most `timeout` seconds; `LockTimeout` names the holder."""
        cdef uint32_t owner = 0
        cdef uint32_t me = self.members.word
        must_write(me != 0, self.name)  # a reader is no member, and has it mapped to read
        if ms_owner_try_take(self.word, me, &owner) == MS_OK:
            self.sit(me, False)
            return
        self.seat.check(owner & 0x7fffffff)
        before = wait_begins(self.seat)
        try:
            self.outwait(me, timeout)
        finally:
            wait_ends(before)

    cdef int outwait(self, uint32_t me, double timeout) except -1:
        cdef uint32_t owner = 0
        cdef int64_t deadline = ms_clock_monotonic_ns() + <int64_t>(timeout * 1e9)
        cdef int64_t left, wait
        cdef ms_status status
        while True:
            left = deadline - ms_clock_monotonic_ns()
            wait = 0 if left <= 0 or let_others_run() else left
            with nogil:
                status = ms_owner_wait(self.word, me, wait, &owner)
            if status == MS_OK:
                self.sit(me, False)
                return 0
            PyErr_CheckSignals()
            if self.members.is_dead(owner):
                if ms_owner_take_over(self.word, me, owner, &owner) == MS_OK:
                    self.sit(me, True)
                    return 0
                continue
            self.seat.check(owner & 0x7fffffff)
            if left <= 0:
                raise _errors.LockTimeout(
                    f"{self.name}: held by {self.members.describe(owner)} for {timeout:g} s")

    def release(self):
        """Give the word back."""
        if self.seat.leave():  # before: then another thread may sit there
            ms_owner_release(self.word)

    @property
    def value(self):
        """What the word holds, without the waiters bit."""
        return ms_load32(self.word) & 0x7fffffff


cdef Word make_word(void *word, object keep, object members, str name, double timeout,
                    str seat=None):
    """`seat`: how the word is called where `name` says what it is wanted for."""
    cdef Word self = Word.__new__(Word)
    self.word = word
    self.keep = keep
    self.members = members
    self.name = name
    self.seat = seat_of(name if seat is None else seat, False, False)
    self.timeout = timeout
    return self
