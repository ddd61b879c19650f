# What is put, and a message under lease.
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from libc.stdint cimport INT32_MAX, UINT32_MAX, UINT64_MAX


cdef enum:
    UPKEEP_NS = 50000000       # how often a queue is kept up: the wheel, deaths, the sweep
    LATE_NS = 3000000000     # how long "interval" lets a change wait for a sync
    ADVANCE_NS = 1000000        # how often a busy consumer advances the wheel
    ALONE_SLICE_NS = 1000000000
    OWNER_NS = 30000000000   # how long the owner of a short word may live and hold it
    COPY_BYTES = 65536       # from here on a copy is worth giving up the GIL
    FAILURE_TEXT = 108
    REPR_KEY = 40            # bytes of a key that a repr shows
    DEAD_MOST = 1024
    SHIFT_US = 10000

cdef object _ZERO = 0
cdef ms_error NOTHING
memset(&NOTHING, 0, sizeof(ms_error))


# --- headers, and other things that are put -------------------------------------------------------

cdef bytes pack_headers(object headers):
    """Headers as a slot has them: u8 and a name, u32 and a value, again and again."""
    cdef list parts = []
    try:
        pairs = list(headers.items())
    except AttributeError as error:
        raise _errors.InvalidType(
            f"headers: expected a mapping, found {type(headers).__name__}") from error
    if len(pairs) > 1024:
        raise _errors.LimitExceeded(f"{len(pairs)} headers, the limit is 1024")
    for name, value in pairs:
        if not isinstance(name, str):
            raise _errors.InvalidType(f"header {name!r}: expected a str as its name")
        encoded = utf8("header", name)
        if len(encoded) > 255:
            raise _errors.LimitExceeded(f"header {name!r:.40}: its name is longer than 255 bytes")
        content = as_bytes(value, "header")
        if len(content) > 1 << 20:
            raise _errors.LimitExceeded(f"header {name!r:.40}: its value is longer than 1 MiB")
        parts.append(len(encoded).to_bytes(1, "little"))
        parts.append(encoded)
        parts.append(len(content).to_bytes(4, "little"))
        parts.append(content)
    return b"".join(parts)


cdef dict unpack_headers(bytes packed):
    """The mapping of packed headers; they were held to their checksum before."""
    cdef dict headers = {}
    cdef Py_ssize_t at = 0, size
    while at < len(packed):
        size = packed[at]
        name = packed[at + 1:at + 1 + size].decode("utf-8", "replace")
        at += 1 + size
        size = int.from_bytes(packed[at:at + 4], "little")
        headers[name] = packed[at + 4:at + 4 + size]
        at += 4 + size
    return headers


cdef bytes failure_text(object reason):
    """What a failure record has room for, cut between characters."""
    cdef bytes text = str(reason).encode("utf-8", "replace")
    if len(text) <= <Py_ssize_t>FAILURE_TEXT:
        return text
    return text[:FAILURE_TEXT].decode("utf-8", "ignore").encode("utf-8")


# --- a message ------------------------------------------------------------------------------------

cdef object observer = None  # what `_observe` was given: a trace of ack, nack, release and reject


@cython.final
@cython.freelist(256)
@cython.no_gc
cdef class Message:
    """A message under lease; made by `Queue.get` and its like.

    Use it in a `with`: the end of the block acknowledges it; an exception counts a failure and
    delivers it again later, but KeyboardInterrupt, cancellation and other exceptions that are no
    `Exception` release it, which is not counted. `Retry`, `Snooze` and `Reject` do what they say,
    and go no further. What the body has finished by itself stays as it is.

    Attributes:
        queue: where it came from.
        id: number of the message, never used again.
        key: bytes, or None.
        priority: its lane, 0 is the most urgent.
        attempt: which attempt this is, 1 for the first.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     queue = store.queue("mail")
    ...     _ = queue.put(b"hello", headers={"to": b"you"})
    ...     with queue.get(timeout=1) as m:
    ...         m.value, m.headers, m.attempt
    (b'hello', {'to': b'you'}, 1)
    """
    cdef readonly QueueCore queue
    cdef ms_lease lease
    cdef PyObject *keeper    # the KeepAlive that renews the lease, borrowed; NULL: none
    cdef bytes content
    cdef bytes packed
    cdef object decoded
    cdef bint is_decoded
    cdef str outcome         # None until it is finished
    cdef bint was_lost
    cdef int64_t put_us
    cdef int64_t ends_ns
    cdef readonly object key
    cdef readonly uint32_t priority
    cdef readonly uint32_t attempt

    def __init__(self, *_, **__):
        raise TypeError("a Message is made by `Queue.get` and its like")

    @property
    def id(self):
        """Number of the message, never used again."""
        return self.lease.id

    @property
    def value(self):
        """What was put. With a codec: decoded at the first access.

        Where the codec cannot, the message goes to the dead letters with that reason, and the
        codec's exception is raised.
        """
        if self.queue.codec is None:
            return self.content
        if not self.is_decoded:
            try:
                self.decoded = self.queue.codec.decode(self.content)
            except Exception as error:
                if self.outcome is None:
                    self.give_up(MS_FAILED_DECODE, f"not decodable: {error!r}", False)
                raise
            self.is_decoded = True
        return self.decoded

    @property
    def data(self):
        """The bytes as they were put, before any decoding."""
        return self.content

    @property
    def headers(self):
        """Mapping of str to bytes."""
        return {} if self.packed is None else unpack_headers(self.packed)

    @property
    def put_at(self):
        """When it was put, a datetime in UTC."""
        return utc_datetime(self.put_us + self.queue.wall_shift())

    @property
    def deadline(self):
        """When the lease ends, a datetime in UTC."""
        cdef ms_instant now
        ms_now(&self.queue.c, &now)
        return utc_datetime(ms_clock_wall_us() + (self.ends_ns - now.mono_ns) // 1000)

    @property
    def lost(self):
        """Did the lease end before its holder was done?"""
        if self.keeper != NULL:
            return (<object>self.keeper).lost
        if self.outcome is None and not self.was_lost and self.queue.usable():
            return not ms_queue_holds(&self.queue.c, &self.lease)
        return self.was_lost

    @property
    def finished(self):
        """How it was finished through this object: "ack", "nack", "release" or "dead"; "": not."""
        return "" if self.outcome is None else self.outcome

    def __repr__(self):
        state = self.outcome or ("lost" if self.lost else "leased")
        key = "" if self.key is None else f"key {bytes(self.key)[:REPR_KEY]!r}, "
        return (f"<Message {self.lease.id} of queue {self.queue.name!r}: "
                f"{len(self.content)} bytes, {key}attempt {self.attempt}, {state}>")

    cdef inline int claim(self) except -1:
        """Before the end of the lease: nobody renews it any more, and its token stands."""
        if self.keeper != NULL:
            (<object>self.keeper).stop()
        return 0

    cdef int ended(self, int status, str outcome, bint loudly) except -1:
        """Keep what a lease ended with; 1 when it was lost."""
        if status < 0:
            fail(status, &NOTHING, self.queue.path)
        cdef str before = self.outcome
        if before is None:
            self.outcome = outcome
            if status == MS_LOST:
                self.was_lost = True
        if status == MS_LOST and loudly:
            why = "its lease ended" if self.was_lost else f"it was finished before: {before}"
            raise _errors.LeaseLost(f"message {self.lease.id}: {why}")
        return status == MS_LOST

    def ack(self):
        """Acknowledge: the message is done and gone.

        Durability: as of the queue, like `put`.

        Raises: LeaseLost where the lease had ended; the message may be delivered again.
        """
        if observer is None:
            self.acknowledge()
        else:
            observer(self, "ack", ())

    cdef inline int acknowledge(self) except -1:
        cdef QueueCore queue = self.queue
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef ms_status status
        queue.alive()
        self.claim()
        ms_now_near(&queue.c, &now)
        status = ms_queue_try_ack(&queue.c, &self.lease, &now, &owner)
        while status == MS_BUSY:
            queue.outwait(owner)
            status = ms_queue_try_ack(&queue.c, &self.lease, &now, &owner)
        if status != MS_OK:
            self.ended(status, "ack", True)
        self.outcome = "ack"
        queue.sync_change(&now)

    def nack(self, delay=None, reason=""):
        """Give it back as failed: counted, delivered again later, or dead when attempts are spent.

        Args:
            delay: seconds until it is delivered again; None: as the retry policy says.
            reason: text, kept with the message (its first 108 bytes).

        Raises: LeaseLost.
        """
        self.queue.alive()
        self.fail(delay, reason, True)

    cdef int fail(self, object delay, object reason, bint loudly) except -1:
        if observer is not None:
            return observer(self, "nack", (delay, reason, loudly))
        return self.count_failure(delay, reason, loudly)

    cdef int count_failure(self, object delay, object reason, bint loudly) except -1:
        cdef QueueCore queue = self.queue
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef cbool dead = False
        cdef bytes text = failure_text(reason)
        cdef ms_status status
        cdef int lost
        if delay is None:
            delay = queue._retry_delay(self.attempt)
        self.claim()
        cdef int64_t delay_ns = microseconds_of("delay", delay) * 1000
        ms_now(&queue.c, &now)
        while True:
            status = ms_queue_try_nack(&queue.c, &self.lease, delay_ns, MS_FAILED,
                                       PyBytes_AS_STRING(text), <size_t>PyBytes_GET_SIZE(text),
                                       &now, &dead, &owner)
            if status != MS_BUSY:
                break
            queue.outwait(owner)
        lost = self.ended(status, "dead" if dead else "nack", loudly)
        queue.sync_change(&now)
        return lost

    def release(self, delay=0):
        """Give it back as it came: this attempt is not counted.

        Args:
            delay: seconds until it is delivered again.

        Raises: LeaseLost.
        """
        self.queue.alive()
        self.give_back(delay, True)

    cdef int give_back(self, object delay, bint loudly) except -1:
        if observer is not None:
            return observer(self, "release", (delay, loudly))
        return self.give_back_now(delay, loudly)

    cdef int give_back_now(self, object delay, bint loudly) except -1:
        cdef QueueCore queue = self.queue
        cdef ms_instant now
        cdef ms_status status
        cdef int lost
        cdef int64_t delay_ns = microseconds_of("delay", delay) * 1000
        self.claim()
        ms_now(&queue.c, &now)
        status = ms_queue_try_release(&queue.c, &self.lease, delay_ns, &now)
        lost = self.ended(status, "release", loudly)
        queue.sync_change(&now)
        return lost

    def reject(self, reason=""):
        """Put it with the dead letters, whatever attempts are left.

        Raises: LeaseLost.
        """
        self.queue.alive()
        self.give_up(MS_FAILED_REJECTED, reason, True)

    cdef int give_up(self, uint32_t kind, object reason, bint loudly) except -1:
        if observer is not None:
            return observer(self, "reject", (kind, reason, loudly))
        return self.give_up_now(kind, reason, loudly)

    cdef int give_up_now(self, uint32_t kind, object reason, bint loudly) except -1:
        cdef QueueCore queue = self.queue
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef bytes text = failure_text(reason)
        cdef ms_status status
        cdef int lost
        self.claim()
        ms_now_near(&queue.c, &now)
        while True:
            status = ms_queue_try_reject(&queue.c, &self.lease, kind, PyBytes_AS_STRING(text),
                                         <size_t>PyBytes_GET_SIZE(text), &now, &owner)
            if status != MS_BUSY:
                break
            queue.outwait(owner)
        lost = self.ended(status, "dead", loudly)
        queue.sync_change(&now)
        return lost

    @staticmethod
    def _observe(found):
        """Have a function called in place of what finishes messages; None: not any more.

        It gets the message, "ack", "nack", "release" or "reject", and the arguments with which it
        returns what `_finish` returns.
        """
        global observer
        observer = found

    def _finish(self, how, arguments):
        """What an observer stands around: finish the message; 1 where its lease was lost."""
        if how == "ack":
            return self.acknowledge()
        if how == "nack":
            return self.count_failure(arguments[0], arguments[1], arguments[2])
        if how == "release":
            return self.give_back_now(arguments[0], arguments[1])
        return self.give_up_now(arguments[0], arguments[1], arguments[2])

    def extend(self, seconds=None):
        """Let the lease end so many seconds from now; None: as long as the queue's leases last.

        Raises: LeaseLost.
        """
        cdef QueueCore queue = self.queue
        cdef ms_instant now
        cdef int64_t lease_ms = queue.lease_ms
        cdef int status
        queue.alive()
        if seconds is not None:
            lease_ms = milliseconds_of_lease(seconds)
        ms_now(&queue.c, &now)
        status = MS_LOST
        if self.keeper != NULL:
            status = (<object>self.keeper)._extend(lease_ms)
        elif self.outcome is None:
            status = ms_queue_try_extend(&queue.c, &self.lease, lease_ms, &now)
        if status == MS_LOST:
            self.was_lost = True
            raise _errors.LeaseLost(
                f"message {self.lease.id}: its lease ended, or it was finished before")
        self.ends_ns = now.mono_ns + lease_ms * 1000000

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.outcome is not None:
            return False
        if error is None:
            self.ack()
            return False
        if not self.queue.usable():
            return False  # its lease ends by itself, and the body's own error is the one to see
        if isinstance(error, _errors.Retry):
            self.fail(error.delay, repr(error), True)
            return True
        if isinstance(error, _errors.Snooze):
            self.give_back(error.delay, True)
            return True
        if isinstance(error, _errors.Reject):
            self.give_up(MS_FAILED_REJECTED, error.reason, True)
            if self.outcome == "dead":
                self.queue._keep_traceback(self.lease.id, error)
            return True
        if isinstance(error, Exception):
            self.fail(None, repr(error), False)
            if self.outcome == "dead" and not self.was_lost:
                self.queue._keep_traceback(self.lease.id, error)
        else:
            self.give_back(0, False)
        return False


cdef int64_t milliseconds_of_lease(object seconds) except -1:
    cdef int64_t found = (microseconds_of("lease", seconds) + 999) // 1000
    if not 1 <= found <= 30 * 86400000:
        raise _errors.InvalidArgument(f"lease {seconds!r}: expected from 1 ms to 30 days")
    return found


cdef object utc_datetime(int64_t microseconds):
    with loading:
        from datetime import datetime, timedelta, timezone
    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=microseconds)
