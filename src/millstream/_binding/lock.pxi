# Which thread of this process has what: locks, and the seats of owner words.
#
# A handler of a signal, a finalizer or a callback may call anything in the middle of a call of its
# own thread. So whoever has to wait checks first whether what it waits for can ever come: not where
# this thread has it, nor where its holder waits, over any number of others, for this thread.
#
# Under gevent a greenlet is what a thread is otherwise: others run in the same thread wherever it
# starts or joins a thread, or waits. A waiter lets them; in the hub, nobody can.
import errno as _errno
import os as _os
from _weakref import ref as _ref

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident()

cdef enum:
    LOCK_SLICE_NS = 50000000  # 50 ms, then check whether the wait can end
    FORK_WAIT_NS = 10000000000
    CHAIN_MOST = 64

cdef double GREENLET_SECONDS = 0.001  # for which the others run before one checks again

cdef dict waiting = {}  # by caller, the seat that it waits for
cdef dict seats = {}    # by name, weakly

cdef bint greenlets = False  # gevent is there
cdef object current_greenlet = None
cdef object pause_greenlet = None
cdef object greenlet_room = None

cdef PyObject *first_held = NULL  # of all that threads of this process have now


def see_greenlets():
    """Where gevent has patched threads by now, the callers are greenlets; not in the middle of a
    call. That it is imported says nothing (huey does so): nobody switches greenlets in our calls.
    """
    global greenlets, current_greenlet, pause_greenlet, greenlet_room
    import sys
    is_patched = getattr(sys.modules.get("gevent.monkey"), "is_module_patched", None)
    if greenlets or held() or is_patched is None or not is_patched("threading"):
        return
    with loading:
        import gevent.threadpool
        from millstream import greenlets as module
    # No function of Python, in which another thread could take the lock that is being taken.
    current_greenlet, pause_greenlet = sys.modules["greenlet"].getcurrent, module.pause
    greenlet_room = module.room
    greenlets = True


cdef object room_of_greenlets():
    """What sleeps in a real thread where gevent runs greenlets in this one, else None."""
    if not greenlets:
        see_greenlets()
        if not greenlets:
            return None
    return greenlet_room()


cdef unsigned long greenlet() noexcept:
    now = current_greenlet()
    return <unsigned long><PyObject *>now


cdef inline unsigned long caller() noexcept:
    """The caller: the thread, or the greenlet."""
    return greenlet() if greenlets else PyThread_get_thread_ident()


cdef bint let_others_run() except -1:
    """Under gevent, let the other greenlets of this thread run for a moment. False: sleep."""
    if not greenlets or greenlet_room() is None:
        return False
    pause_greenlet(GREENLET_SECONDS)
    return True


cdef class _Taken:
    """What a `with` takes; its block gives it back."""
    cdef PyObject *begun  # the block that `__enter__` is called for next

    cdef int take_it(self) except -1:
        return 0

    cdef int give_back(self, error) except -1:
        return 0

    def __enter__(self):
        cdef _Block block = None if self.begun == NULL else <_Block>self.begun
        self.begun = NULL
        self.take_it()
        if block is not None:
            block.entered = True
        return self

    @property
    def __exit__(self):
        """A new block: all Pythons ask for it before they call `__enter__`."""
        cdef _Block block = _Block.__new__(_Block)
        block.taken = self
        self.begun = <PyObject *>block
        return block


@cython.final
@cython.no_gc
@cython.freelist(16)
cdef class _Block:
    """One block of a `with`. It is on the stack of the statement, and gives back at the latest when
    it dies: in Python 3.14 what a signal handler raises may come between `__enter__` and the block,
    and then no `__exit__` is called.
    """
    cdef _Taken taken
    cdef bint entered

    def __call__(self, kind, error, trace):
        self.entered = False
        self.taken.give_back(error)

    def __dealloc__(self):
        if self.taken.begun == <PyObject *>self:
            self.taken.begun = NULL
        if self.entered:
            self.taken.give_back(None)


cdef class _Seat(_Taken):
    """Says which thread of this process has what one thread at a time can have."""
    cdef object __weakref__
    cdef readonly str name
    cdef unsigned long holder
    cdef unsigned long thread  # of a holder that is a greenlet
    cdef uint32_t fork
    cdef uint32_t owner      # of a word: what it holds then; else 0
    cdef bint inherited      # of a word: from a dead owner
    cdef public object members  # `Members` of the open store to which it, or its holder, belongs
    cdef PyObject *before    # in the list of what is held
    cdef PyObject *after
    cdef bint listed

    def __dealloc__(self):
        if self.listed:
            self.unlist()

    cdef inline bint is_mine(self, uint32_t owner) noexcept:
        return (self.holder == caller() and self.fork == ms_fork_count()
                and self.owner == owner)

    cdef inline void sit(self, uint32_t owner, bint inherited) noexcept:
        global first_held
        if self.listed:  # its holder died without giving it back
            self.unlist()
        self.holder = caller()
        self.fork = ms_fork_count()
        self.owner = owner
        self.inherited = inherited
        if greenlets:
            self.thread = PyThread_get_thread_ident()
        self.before = NULL
        self.after = first_held
        if first_held != NULL:
            (<_Seat>first_held).before = <PyObject *>self
        first_held = <PyObject *>self
        self.listed = True

    cdef inline bint leave(self) noexcept:
        """False: a forked child comes out of a block that its parent is in."""
        if self.fork != ms_fork_count():
            return False
        self.holder = 0
        if self.listed:
            self.unlist()
        return True

    cdef inline void unlist(self) noexcept:
        global first_held
        self.listed = False
        if self.fork != ms_fork_count():  # the list of a child began anew
            return
        if self.before != NULL:
            (<_Seat>self.before).after = self.after
        else:
            first_held = self.after
        if self.after != NULL:
            (<_Seat>self.after).before = self.before

    cdef bint leads_here(self, uint32_t owner):
        """Does whoever has it wait for what this thread has?"""
        cdef unsigned long me = caller()
        cdef _Seat at = self
        cdef int steps
        # Another greenlet of this thread goes on only where this one may let it.
        cdef unsigned long stopped = 0
        if greenlets and greenlet_room() is None:
            stopped = PyThread_get_thread_ident()
        for steps in range(CHAIN_MOST):
            if at.holder == 0 or at.fork != ms_fork_count() or (at is self and at.owner != owner):
                return False
            if at.holder == me or (stopped != 0 and at.thread == stopped):
                return True
            at = waiting.get(at.holder)
            if at is None:
                return False
        return False

    cdef int check(self, uint32_t owner) except -1:
        """Raise where waiting for it would never end."""
        if self.leads_here(owner):
            raise _errors.Reentered(
                f"{self.name}: is held by the call of this thread that a signal handler, finalizer"
                " or callback is in the middle of; it was not waited for. Let that call end first:"
                " have the handler set a flag, say, and look at it where nothing is under way")
        return 0


cdef tuple wait_begins(_Seat seat):
    """Keep what this thread waits for; returns what `wait_ends` needs."""
    me = caller()
    cdef tuple before = (me, waiting.get(me))
    waiting[before[0]] = seat
    return before


cdef int wait_ends(tuple before) except -1:
    """Takes no memory: behind a wait that has ended well it would lose what was waited for."""
    if before[1] is None:
        waiting.pop(before[0], None)
    else:
        waiting[before[0]] = before[1]
    return 0


@cython.final
cdef class _Forget:
    """Called when the last handle of a seat is gone."""
    cdef str name

    def __call__(self, gone):
        if seats.get(self.name) is gone:
            del seats[self.name]


cdef _Seat seat_of(str name, bint is_lock, bint reentrant):
    """The seat of a name: one in this process, however many handles there are."""
    cdef _Seat seat
    cdef _Forget forget
    known = seats.get(name)
    seat = None if known is None else known()
    if seat is None:
        seat = Lock(name, reentrant=reentrant) if is_lock else _Seat.__new__(_Seat)
        seat.name = name
        forget = _Forget.__new__(_Forget)
        forget.name = name
        seats[name] = _ref(seat, forget)
    return seat


cdef bint is_under_way(object name):
    """Is a module there that is not whole yet?"""
    import sys
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


cdef dict modules = {}


cdef object module_of(str name):
    """A module that only some calls need, imported at the first of them."""
    found = modules.get(name)
    if found is None:
        with loading:
            from importlib import import_module
            found = modules[name] = import_module(name)
    return found


@cython.final
cdef class Lock(_Seat):
    """The lock of threads that all of the package uses; `with lock:` holds it.

    To take it in the middle of a call that has it raises `Reentered`, or enters it again where it
    is `reentrant`. So does a wait that would never end. A forked child has a free one. Ctrl-C comes
    before it is taken or within the block.
    """
    cdef uint32_t word
    cdef uint32_t depth
    cdef uint32_t sleepers
    cdef bint reentrant
    cdef bint is_loading

    def __init__(self, str name, members=None, *, bint reentrant=False):
        self.name = name
        self.members = members
        self.reentrant = reentrant

    cdef int take_it(self) except -1:
        self.hold(True, -1)
        return 0

    cdef int give_back(self, error) except -1:
        self.let_go()
        if not self.is_loading or isinstance(error, _errors.MillstreamError):
            return 0
        ours = str(getattr(error, "name", None)).startswith("millstream.")
        if isinstance(error, ModuleNotFoundError) and not ours:
            return 0  # an extra that is not installed: its caller says so
        if isinstance(error, OSError):
            raise _errors.StorageError(
                error.errno or 0, f"importing it failed: {error.strerror}",
                error.filename) from error
        if isinstance(error, ImportError) and is_under_way(error.name):
            raise _errors.Reentered(
                f"{error.name}: is being imported by what a signal handler, finalizer or callback"
                " is in the middle of; do the work when that import is done") from error
        if isinstance(error, ImportError):  # no descriptor, memory, or right to read the package
            raise _errors.StorageError(0, f"importing it failed: {error}", error.path) from error
        return 0

    @property
    def mine(self):
        """Does this thread have it?"""
        return self.is_mine(0)

    def acquire(self, bint blocking=True, double timeout=-1):
        """Take it; False where it is not free, at once or after `timeout` seconds."""
        return self.hold(blocking, timeout)

    cdef bint hold(self, bint blocking, double timeout) except -1:
        if self.fork != ms_fork_count():
            self.holder = self.sleepers = 0
        if self.holder != 0:
            if self.is_mine(0):
                if self.reentrant:
                    self.depth += 1
                    return True
                if not blocking:
                    return False
            elif not blocking:
                return False
            self.check(0)
            if not self.outwait(timeout):
                return False
        self.sit(0, False)
        self.depth = 1
        return True

    cdef bint outwait(self, double timeout) except -1:
        """Sleep until it is free; False: the time is over."""
        cdef int64_t deadline = INT64_MAX
        cdef int64_t left
        cdef uint32_t seen
        if timeout >= 0:
            deadline = ms_clock_monotonic_ns() + <int64_t>(timeout * 1e9)
        before = wait_begins(self)
        try:
            while self.holder != 0:
                self.check(0)
                left = deadline - ms_clock_monotonic_ns()
                if left <= 0:
                    return False
                if let_others_run():
                    continue
                left = min(left, <int64_t>LOCK_SLICE_NS)
                seen = self.word
                self.sleepers += 1
                with nogil:
                    ms_futex_wait(<const void *>&self.word, seen, left)
                self.sleepers -= 1
                PyErr_CheckSignals()
        finally:
            wait_ends(before)
        return True

    def release(self):
        """Give it back."""
        self.let_go()

    cdef void let_go(self) noexcept:
        if self.fork != ms_fork_count():
            return
        self.depth -= 1
        if self.depth == 0 and self.leave():
            self.word += 1
            if self.sleepers:
                ms_futex_wake(<const void *>&self.word, 1)


def lock_of(str name, *, bint reentrant=False):
    """The lock of a name: one in this process, for what several handles have in common."""
    return seat_of(name, True, reentrant)


def held(members=None):
    """Names of the locks and words that this thread has: of one open store, by its `Members`, or
    of all. Empty where no call is under way.
    """
    cdef PyObject *at = first_held
    cdef unsigned long me = caller()
    cdef _Seat seat
    cdef list found = []
    while at != NULL:
        seat = <_Seat>at
        if seat.holder == me and (members is None or seat.members is members):
            found.append(seat.name)
        at = seat.after
    return found


def start(thread, path):
    """Start a thread, for what is at a path.

    Raises: StorageError where there can be none.
    """
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        raise _errors.StorageError(
            _errno.EAGAIN,
            f"no thread could be started ({error}); raise the limit of processes (ulimit -u, "
            "pids.max) and call again", path) from error


def join(thread, double timeout=-1):
    """Wait until a thread ended; False: it did not in `timeout` seconds.

    Raises: Reentered where it waits for what this thread has.
    """
    cdef _Seat seat = _Seat.__new__(_Seat)
    cdef int64_t deadline = INT64_MAX
    if timeout >= 0:
        deadline = ms_clock_monotonic_ns() + <int64_t>(timeout * 1e9)
    seat.name = f"thread {thread.name}"
    seat.holder = thread.ident
    seat.fork = ms_fork_count()
    before = wait_begins(seat)
    try:
        while thread.is_alive():
            seat.check(0)
            if ms_clock_monotonic_ns() >= deadline:
                return False
            thread.join(0.05)
    finally:
        wait_ends(before)
    return True


@cython.final
cdef class Bell:
    """Wakes all who wait: `seen = bell.rung`, check, then `bell.wait(seen, seconds)`.

    Has no lock, so that any call may be interrupted by any other.
    """
    cdef uint32_t word
    cdef uint32_t sleepers

    @property
    def rung(self):
        """How often it was rung."""
        return self.word

    def ring(self):
        """Wake all."""
        self.word += 1
        if self.sleepers:
            ms_futex_wake(<const void *>&self.word, INT32_MAX)

    def wait(self, uint32_t seen, double seconds=1.0):
        """Return when it was rung since, after `seconds`, or earlier."""
        cdef int64_t left = <int64_t>(max(0.0, min(seconds, 1.0)) * 1e9)
        room = room_of_greenlets()
        if room is not None:
            room(self._wait_here, (seen, left))
        else:
            self._wait_here(seen, left)
            PyErr_CheckSignals()

    def sleep(self, uint32_t seen):
        """For a thread of our own, which gets no signals: return when it was rung since."""
        if room_of_greenlets() is not None:
            self.wait(seen)
        else:
            self._wait_here(seen, INT64_MAX)

    def _wait_here(self, uint32_t seen, int64_t left):
        self.sleepers += 1
        with nogil:
            ms_futex_wait(<const void *>&self.word, seen, left)
        self.sleepers -= 1


@cython.final
cdef class Flag:
    """What is set once, or cleared again, and waited for; as an Event, but without a lock."""
    cdef Bell bell
    cdef bint up

    def __cinit__(self):
        self.bell = Bell()

    def is_set(self):
        """Is it?"""
        return self.up

    def set(self):
        """Set it, and wake all who wait."""
        self.up = True
        self.bell.ring()

    def clear(self):
        """Have it not set."""
        self.up = False

    def wait(self, double seconds=1e30):
        """Wait until it is set; False: it was not in `seconds`."""
        cdef double end = ms_clock_monotonic_ns() * 1e-9 + seconds
        cdef double left
        cdef uint32_t seen
        while True:
            seen = self.bell.word
            if self.up:
                return True
            left = end - ms_clock_monotonic_ns() * 1e-9
            if left <= 0:
                return False
            self.bell.wait(seen, left)


# Imports of the package at their first use: `with loading:`. What interrupts one could meet modules
# that are half there. A fork waits for one of another thread, of which the child would keep the
# lock for ever.
loading = Lock("an import of millstream")
(<Lock>loading).is_loading = True
cdef unsigned long forking = 0


def _before_fork():
    """Runs no signal handler: what it raises here would be lost."""
    global forking
    cdef int64_t deadline = ms_clock_monotonic_ns() + <int64_t>FORK_WAIT_NS
    cdef Lock lock = loading
    cdef uint32_t seen
    if lock.is_mine(0):
        return
    while lock.holder != 0 and lock.fork == ms_fork_count():
        if ms_clock_monotonic_ns() > deadline:
            return
        if greenlets and lock.thread == PyThread_get_thread_ident():  # it stands still meanwhile
            return
        seen = lock.word
        lock.sleepers += 1
        with nogil:
            ms_futex_wait(<const void *>&lock.word, seen, LOCK_SLICE_NS)
        lock.sleepers -= 1
    forking = caller()
    lock.acquire()


def _after_fork_in_parent():
    global forking
    if forking == caller():
        forking = 0
        (<Lock>loading).release()


def _after_fork_in_child():
    global first_held, forking
    first_held = NULL
    forking = 0
    waiting.clear()


ms_fork_watch()
_os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent,
                     after_in_child=_after_fork_in_child)
