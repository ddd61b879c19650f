# ms_queue.h: the hot methods of a queue, and its messages. What is not hot, or needs the file
# system, is queue.py's, through the hooks.
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from libc.stdint cimport INT32_MAX, UINT32_MAX, UINT64_MAX


cdef enum:
    LOOK_NS = 50000000       # how often deaths are looked for
    TURN_NS = 1000000        # how often a busy consumer turns the wheel
    ALONE_SLICE_NS = 1000000000
    OWNER_NS = 30000000000   # how long the owner of a short word may live and hold it
    COPY_BYTES = 65536       # from here on a copy is worth giving up the GIL
    FAILURE_TEXT = 108
    DEAD_MOST = 1024

cdef int64_t FOREVER_NS = <int64_t>1 << 62
cdef int64_t DELAY_MOST_US = <int64_t>100 * 365 * 86400 * 1000000
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
        encoded = name.encode("utf-8")
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


cdef bytes as_bytes(object value, str what):
    """Bytes of anything bytes-like."""
    if type(value) is bytes:
        return value
    if not PyObject_CheckBuffer(value):
        raise _errors.InvalidType(f"{what}: expected bytes-like, found {type(value).__name__}")
    return memoryview(value).tobytes()


cdef int64_t microseconds_of(str what, object seconds) except -1:
    """A time-span that a caller gave, in microseconds, rounded up: never early."""
    cdef double given
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise _errors.InvalidType(f"{what} {seconds!r}: expected a number of seconds")
    if not 0 <= seconds <= DELAY_MOST_US / 1000000:
        raise _errors.InvalidArgument(f"{what} {seconds!r}: expected from 0 seconds to 100 years")
    given = seconds
    cdef int64_t whole = <int64_t>(given * 1e6)
    return whole + (whole < given * 1e6)


cdef int64_t deadline_of(object timeout) except -1:
    """The instant of CLOCK_MONOTONIC at which a wait ends."""
    if timeout is None:
        return FOREVER_NS
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise _errors.InvalidType(f"timeout {timeout!r}: expected a number of seconds or None")
    if not timeout >= 0:
        raise _errors.InvalidArgument(f"timeout {timeout!r}: cannot be negative")
    return ms_clock_monotonic_ns() + <int64_t>(<double>min(timeout, 1e9) * 1e9)


cdef bytes failure_text(object reason):
    """What a failure record has room for, cut between characters."""
    cdef bytes text = str(reason).encode("utf-8", "replace")
    if len(text) <= FAILURE_TEXT:
        return text
    return text[:FAILURE_TEXT].decode("utf-8", "ignore").encode("utf-8")


# --- a message ------------------------------------------------------------------------------------

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
    cdef QueueCore queue
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

    @property
    def id(self):
        """Number of the message, never used again."""
        return self.lease.id

    @property
    def value(self):
        """What was put. With a codec: decoded at the first look.

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
        return utc_datetime(self.put_us)

    @property
    def deadline(self):
        """When the lease ends, a datetime in UTC."""
        cdef ms_instant now
        ms_now(&now)
        return utc_datetime(now.wall_us + (self.ends_ns - now.mono_ns) // 1000)

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
        state = "finished" if self.outcome else "lost" if self.lost else "leased"
        return f"<Message {self.lease.id} of {self.queue!r}: attempt {self.attempt}, {state}>"

    cdef inline int claim(self) except -1:
        """Before the end of the lease: nobody renews it any more, and its token stands."""
        if self.keeper != NULL:
            (<object>self.keeper).stop()
        return 0

    cdef int settle(self, int status, str outcome, bint loudly) except -1:
        """After the end of a lease; 1 when it was lost."""
        if status < 0:
            fail(status, &NOTHING, self.queue.path)
        if self.outcome is None:
            self.outcome = outcome
        if status == MS_LOST:
            self.was_lost = True
            if loudly:
                raise _errors.LeaseLost(
                    f"message {self.lease.id}: its lease ended, or it was finished before")
            return 1
        return 0

    def ack(self):
        """Acknowledge: the message is done and gone.

        Durability: as of the queue, like `put`.

        Raises: LeaseLost where the lease had ended; the message may be delivered again.
        """
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
            self.settle(status, "ack", True)
        self.outcome = "ack"
        queue.note()

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
        ms_now(&now)
        while True:
            status = ms_queue_try_nack(&queue.c, &self.lease, delay_ns, MS_FAILED,
                                       PyBytes_AS_STRING(text), <size_t>PyBytes_GET_SIZE(text),
                                       &now, &dead, &owner)
            if status != MS_BUSY:
                break
            queue.outwait(owner)
        lost = self.settle(status, "dead" if dead else "nack", loudly)
        queue.note()
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
        cdef QueueCore queue = self.queue
        cdef ms_instant now
        cdef ms_status status
        cdef int lost
        cdef int64_t delay_ns = microseconds_of("delay", delay) * 1000
        self.claim()
        ms_now(&now)
        status = ms_queue_try_release(&queue.c, &self.lease, delay_ns, &now)
        lost = self.settle(status, "release", loudly)
        queue.note()
        return lost

    def reject(self, reason=""):
        """Put it with the dead letters, whatever attempts are left.

        Raises: LeaseLost.
        """
        self.queue.alive()
        self.give_up(MS_FAILED_REJECTED, reason, True)

    cdef int give_up(self, uint32_t kind, object reason, bint loudly) except -1:
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
        lost = self.settle(status, "dead", loudly)
        queue.note()
        return lost

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
        ms_now(&now)
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
            return True
        if isinstance(error, Exception):
            self.fail(None, repr(error), False)
        else:
            self.give_back(0, False)
        return False


cdef int64_t milliseconds_of_lease(object seconds) except -1:
    cdef int64_t found = (microseconds_of("lease", seconds) + 999) // 1000
    if not 1 <= found <= 30 * 86400000:
        raise _errors.InvalidArgument(f"lease {seconds!r}: expected from 1 ms to 30 days")
    return found


cdef object utc_datetime(int64_t microseconds):
    from datetime import datetime, timedelta, timezone
    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=microseconds)


# --- the queue ------------------------------------------------------------------------------------

cdef class QueueCore:
    """Base of `millstream.Queue`: its files as mapped, putting and taking.

    Hooks of the subclass: ``_grow_slots(count)``, ``_grow_blocks(count)``, ``_check_live()``,
    ``_check_writable()``, ``_check_dedup()``, ``_changed()``, ``_make_durable()``,
    ``_retry_delay(attempt)``, ``_due(at)``.
    """
    cdef ms_queue c
    cdef list keep
    cdef object members
    cdef object codec
    cdef bint attached
    cdef bint writable
    cdef bint is_closed
    cdef bint changed
    cdef uint32_t fork
    cdef int level
    cdef int64_t lease_ms
    cdef int64_t ttl_us
    cdef int64_t payload_max
    cdef int64_t turned_at
    cdef int64_t looked_at
    cdef int64_t next_due

    # --- what the subclass builds on --------------------------------------------------------------

    def _attach(self, slots, blocks, hints, dict numbers, members, bint writable):
        """Use these maps. What was mapped before stays, for threads that are still in it."""
        cdef ms_error err
        cdef ms_queue c
        cdef uint64_t blocks_size = 0
        cdef _ControlBuffer slots_buffer, blocks_buffer, hints_buffer
        memset(&c, 0, sizeof(ms_queue))
        slots_buffer = hold_control(slots)
        hints_buffer = hold_control(hints)
        c.slots = <ms_slots_header *>slots_buffer.buffer.buf
        c.hints = <ms_hints_header *>hints_buffer.buffer.buf
        if self.keep is None:
            self.keep = []
            self.fork = ms_fork_count()
        if blocks is not None:
            blocks_buffer = hold_control(blocks)
            c.blocks = <ms_blocks_header *>blocks_buffer.buffer.buf
            blocks_size = <uint64_t>blocks_buffer.buffer.len
            self.keep.append(blocks_buffer)
        self.keep.append(slots_buffer)
        self.keep.append(hints_buffer)
        c.salt = c.slots.salt
        c.slot_bytes = numbers["slot_bytes"]
        c.capacity = numbers["capacity"]
        c.dead_limit = numbers["dead_limit"]
        c.slot_max = c.capacity + c.dead_limit
        c.block_max = numbers["block_max"]
        c.lanes = numbers["priorities"]
        c.max_attempts = numbers["max_attempts"]
        c.generation = numbers["generation"]
        c.ageing = numbers["ageing"]
        c.block_key = numbers["block_key"]
        c.self = members.word if writable else 0
        status = ms_queue_attach(&c, <uint64_t>slots_buffer.buffer.len, blocks_size,
                                 <uint64_t>hints_buffer.buffer.len, &err)
        if status < 0:
            fail(status, &err, self.path)
        self.c = c
        self.members = members
        self.writable = writable
        self.attached = True

    def _configure_core(self, double lease, ttl, int64_t payload_max, codec, str durability):
        self.lease_ms = milliseconds_of_lease(lease)
        self.ttl_us = 0 if ttl is None else microseconds_of("ttl", ttl)
        self.payload_max = payload_max
        self.codec = codec
        self.level = LEVELS[durability]

    def _set_policy(self, uint32_t max_attempts, bint ageing, bint block_key):
        self.c.max_attempts = max_attempts
        self.c.ageing = ageing
        self.c.block_key = block_key

    def _recover(self, bint verify):
        """As the one who makes the hints, which nobody else has yet."""
        cdef ms_instant now
        cdef void *scratch = malloc(<size_t>ms_load32(&self.c.slots.slot_count) * 24 + 64)
        if scratch == NULL:
            raise MemoryError
        ms_now(&now)
        try:
            with nogil:
                ms_queue_recover(&self.c, verify, &now, scratch)
        finally:
            free(scratch)

    def _set_next_id(self, uint64_t least):
        if ms_load64(&self.c.slots.next_id) < least:
            ms_store64(&self.c.slots.next_id, least)

    def _publish_slots(self, uint32_t count):
        ms_queue_publish_slots(&self.c, count)

    def _publish_blocks(self, uint32_t count):
        ms_queue_publish_blocks(&self.c, count)

    def _word(self, str name, str what, double timeout):
        """A long word of the queue: "maintenance" or "sync"."""
        cdef void *word
        if name == "maintenance":
            word = &self.c.hints.maintenance
        else:
            word = &self.c.hints.sync
        return make_word(word, self, self.members, what, timeout)

    def _begin_sync(self):
        """Number of the sync that begins now. Holder of the word."""
        cdef uint64_t number = ms_load64(&self.c.hints.sync_begun) + 1
        ms_store64(&self.c.hints.sync_begun, number)
        ms_fence()
        return number

    def _end_sync(self, uint64_t number):
        ms_store64(&self.c.hints.sync_ended, number)

    def _close(self):
        self.is_closed = True

    def _wake_all(self):
        """Have everybody look again who waits here."""
        if self.attached and self.writable:
            ms_queue_wake(&self.c, MS_WAIT_MESSAGE, INT32_MAX)
            ms_queue_wake(&self.c, MS_WAIT_ROOM, INT32_MAX)
            ms_queue_wake(&self.c, MS_WAIT_SETTLED, INT32_MAX)

    def _wake(self, str place, int32_t count):
        ms_queue_wake(&self.c, PLACES[place], count)

    def _take_changed(self):
        """Did this process change anything since the last call?"""
        cdef bint found = self.changed
        self.changed = False
        return found

    @property
    def _state(self):
        return ms_load32(&self.c.hints.state)

    def _set_state(self, uint32_t state):
        ms_store32(&self.c.hints.state, state)

    @property
    def _slot_count(self):
        return ms_load32(&self.c.slots.slot_count)

    @property
    def _block_count(self):
        return 0 if self.c.blocks == NULL else ms_load32(&self.c.blocks.block_count)

    @property
    def _paused(self):
        return ms_load32(&self.c.slots.paused)

    def _set_paused(self, uint32_t paused):
        ms_store32(&self.c.slots.paused, paused)

    @property
    def _poison(self):
        return ms_load32(&self.c.slots.poison)

    def _set_poison(self, uint32_t poison):
        ms_store32(&self.c.slots.poison, poison)

    @property
    def _syncs(self):
        """(syncs begun, the last that ended well)."""
        return ms_load64(&self.c.hints.sync_begun), ms_load64(&self.c.hints.sync_ended)

    def _counters(self):
        return {"gets": ms_load64(&self.c.hints.gets),
                "expired": ms_load64(&self.c.hints.expired),
                "evicted": ms_load64(&self.c.hints.evicted),
                "redelivered": ms_load64(&self.c.hints.redelivered),
                "corrupt": ms_load64(&self.c.hints.corrupt)}

    @property
    def closed(self):
        """Is the handle closed?"""
        return self.is_closed or self.fork != ms_fork_count()

    cdef inline bint usable(self) noexcept:
        return not self.is_closed and self.fork == ms_fork_count()

    cdef inline int alive(self) except -1:
        """May this process change the queue?"""
        if self.is_closed or self.fork != ms_fork_count() or not self.writable or \
                ms_load32(&self.c.hints.state) != 1 or ms_load32(&self.c.slots.poison) != 0:
            self._check_writable()
        return 0

    cdef int visible(self) except -1:
        """May this process look at the queue?"""
        if self.is_closed or self.fork != ms_fork_count() or ms_load32(&self.c.hints.state) != 1:
            self._check_live()
        return 0

    cdef inline int note(self) except -1:
        """Something was changed: sync it as the level says."""
        if self.level == 2:
            self._make_durable()
        elif not self.changed:
            self.changed = True
            self._changed()
        return 0

    # --- what time and deaths bring ---------------------------------------------------------------

    cdef int turn(self, const ms_instant *now) except -1:
        """Ready what is due."""
        self.turned_at = now.mono_ns
        ms_queue_try_turn(&self.c, now, &self.next_due)
        return 0

    cdef int look(self, const ms_instant *now) except -1:
        """Do what is due: the wheel, the look for deaths, the sweep."""
        cdef ms_instant then = now[0]
        self.looked_at = now.mono_ns
        self.turn(now)
        if ms_queue_claim_watch(&self.c, now, LOOK_NS):
            self.watch(now)
        if ms_queue_sweep_due(&self.c, now):
            with nogil:
                ms_queue_sweep(&self.c, &then, NULL, 0)
        return 0

    cdef int watch(self, const ms_instant *now) except -1:
        """Give what the dead held to others."""
        cdef uint32_t dead[DEAD_MOST]
        cdef uint32_t count = 0, i, word
        cdef ms_instant then = now[0]
        for i in range(DEAD_MOST):
            word = ms_load32(&self.c.participants[i])
            if word != 0 and word != self.c.self and self.members.is_dead(word):
                dead[count] = word
                count += 1
        if count:
            with nogil:
                ms_queue_sweep(&self.c, &then, dead, count)
            ms_queue_wake(&self.c, MS_WAIT_ROOM, INT32_MAX)
        return 0

    cdef bint alone(self) noexcept:
        """Has no other process put or taken here, of those that live?"""
        cdef uint32_t i, word
        for i in range(DEAD_MOST):
            word = ms_load32(&self.c.participants[i])
            if word != 0 and word != self.c.self:
                return False
        return True

    cdef int outwait(self, uint32_t owner) except -1:
        """Another holds a short word: wait a moment, mend what a dead one held."""
        cdef ms_instant now
        cdef uint32_t dead = owner & 0x7fffffff, never = 0
        with nogil:
            ms_futex_wait(&never, 0, 100000)
        PyErr_CheckSignals()
        if self.members.is_dead(dead):
            ms_now(&now)
            with nogil:
                ms_queue_sweep(&self.c, &now, &dead, 1)
        return 0

    def _look(self):
        """Do what is due now."""
        cdef ms_instant now
        self.alive()
        ms_now(&now)
        self.look(&now)

    def _sweep(self):
        """One pass over all messages, whether it is due or not."""
        cdef ms_instant now
        cdef uint32_t count
        self.alive()
        ms_now(&now)
        with nogil:
            count = ms_queue_sweep(&self.c, &now, NULL, 0)
        return count

    cdef int64_t slice(self, const ms_instant *now, int64_t deadline) noexcept:
        """How long to sleep at most before looking again."""
        cdef int64_t most = ALONE_SLICE_NS if self.alone() else LOOK_NS
        cdef uint64_t ends = ms_load64(&self.c.hints.lease_due)
        most = min(most, deadline - now.mono_ns)
        if self.next_due != INT64_MAX:
            most = min(most, self.next_due - now.boot_ns)
        if 0 < ends < <uint64_t>INT64_MAX:
            most = min(most, max(<int64_t>ends - now.mono_ns, 1000000))
        return max(most, 0)

    # --- putting ----------------------------------------------------------------------------------

    cdef int put_one(self, object value, object priority, object delay, object at, object key,
                     object ttl, object dedup_id, object headers, const ms_instant *now,
                     ms_lease *out, uint32_t *out_owner, ms_error *err) except? -1000:
        """Put one message; the status of the core."""
        cdef ms_message message
        cdef bytes data, key_bytes, packed
        cdef int64_t due
        cdef uint64_t total
        memset(&message, 0, sizeof(ms_message))
        if type(value) is bytes:
            data = value
        else:
            data = as_bytes(value, "value")
        message.payload = <const uint8_t *>PyBytes_AS_STRING(data)
        if PyBytes_GET_SIZE(data) > self.payload_max:
            raise _errors.LimitExceeded(
                f"a payload of {len(data)} bytes, the limit is {self.payload_max}")
        message.payload_length = <uint32_t>PyBytes_GET_SIZE(data)
        if priority is not _ZERO:
            message.lane = self.lane_of(priority)
        if not (PyFloat_CheckExact(delay) and PyFloat_AS_DOUBLE(delay) == 0.0):
            message.delay_ns = microseconds_of("delay", delay) * 1000
            if message.delay_ns:
                message.due_us = now.wall_us + message.delay_ns // 1000
        if at is not None:
            if message.delay_ns:
                raise _errors.InvalidArgument("give a delay or a time, not both")
            due = self._due(at)
            if due - now.wall_us > DELAY_MOST_US:
                raise _errors.InvalidArgument(f"at {at!r}: more than 100 years from now")
            if due > now.wall_us:
                message.due_us = due
                message.delay_ns = (due - now.wall_us) * 1000
        if key is not None:
            key_bytes = as_bytes(key, "key")
            if PyBytes_GET_SIZE(key_bytes) > MS_KEY_BYTES_MAX:
                raise _errors.LimitExceeded(
                    f"a key of {len(key_bytes)} bytes, the limit is {MS_KEY_BYTES_MAX}")
            message.key = <const uint8_t *>PyBytes_AS_STRING(key_bytes)
            message.key_length = <uint32_t>PyBytes_GET_SIZE(key_bytes)
            message.key_hash = ms_xxh3_64(message.key, message.key_length, 0)
            message.key_hash += message.key_hash == 0
        if headers is not None:
            packed = pack_headers(headers)
            message.headers = <const uint8_t *>PyBytes_AS_STRING(packed)
            message.headers_length = <uint32_t>PyBytes_GET_SIZE(packed)
        if ttl is not None:
            message.expires_us = now.wall_us + microseconds_of("ttl", ttl)
        elif self.ttl_us:
            message.expires_us = now.wall_us + self.ttl_us
        if dedup_id is not None:
            self._check_dedup()
            self.hash_dedup(dedup_id, message.dedup)
        total = <uint64_t>message.key_length + message.headers_length + message.payload_length
        if total > self.c.slot_bytes - sizeof(ms_slot) and \
                total > <uint64_t>self.c.block_max * 4096:
            raise _errors.LimitExceeded(
                f"a message of {total} bytes: more than a slot, and all blocks, hold")
        return ms_queue_try_put(&self.c, &message, now, out, out_owner, err)

    cdef int hash_dedup(self, object dedup_id, uint64_t *out) except -1:
        cdef bytes text
        if isinstance(dedup_id, str):
            text = dedup_id.encode("utf-8")
        else:
            text = as_bytes(dedup_id, "dedup_id")
        out[0] = ms_xxh3_64(PyBytes_AS_STRING(text), <size_t>PyBytes_GET_SIZE(text), 0)
        out[1] = ms_xxh3_64(PyBytes_AS_STRING(text), <size_t>PyBytes_GET_SIZE(text),
                            0x9e3779b97f4a7c15)
        out[0] += out[0] == 0
        return 0

    cdef uint32_t lane_of(self, object priority) except? 0xffffffff:
        try:
            found = PyNumber_Index(priority)
        except TypeError as error:
            raise _errors.InvalidType(f"priority {priority!r}: expected an int") from error
        if not 0 <= found < self.c.lanes:
            raise _errors.InvalidArgument(
                f"priority {priority}: the queue has priorities 0 to {self.c.lanes - 1}")
        return found

    cdef int resolve_put(self, int status, uint32_t owner, const ms_error *err, int64_t started,
                         int64_t deadline, bint *io_announced, uint32_t *io_ticket) except -1:
        """Do what a put could not; 1: the time is over and the queue still full."""
        cdef ms_instant now
        cdef int64_t most
        if status < 0:
            fail(status, err, self.path)
        if status == MS_GROW_SLOTS:
            self._grow_slots(ms_load32(&self.c.slots.slot_count))
        elif status == MS_GROW_BLOCKS:
            self._grow_blocks(0 if self.c.blocks == NULL
                              else ms_load32(&self.c.blocks.block_count))
        elif status == MS_BUSY:
            self.outwait(owner)
            if ms_clock_monotonic_ns() - started > OWNER_NS:
                raise _errors.LockTimeout(f"{self.path}: held by {self.members.describe(owner)}")
        else:
            ms_now(&now)
            if io_announced[0]:
                io_announced[0] = False
                if now.mono_ns >= deadline:
                    return 1
                most = min(<int64_t>LOOK_NS, deadline - now.mono_ns)
                with nogil:
                    ms_queue_sleep(&self.c, MS_WAIT_ROOM, io_ticket[0], most)
                PyErr_CheckSignals()
            elif deadline <= started:  # it does not wait
                self.look(&now)
                io_announced[0] = True  # once more, then it is over
                io_ticket[0] = 0
            else:
                io_ticket[0] = ms_queue_announce(&self.c, MS_WAIT_ROOM)
                io_announced[0] = True
                self.look(&now)
        self.alive()
        return 0

    def put(self, value, *, priority=0, delay=0.0, at=None, key=None, ttl=None, dedup_id=None,
            headers=None, timeout=None):
        """Put a message and return its id.

        Durability: at `process` and `interval` the message survives the death of any process when
        this returns; at `interval` also a power cut after the next completed sync (one starts every
        100 ms); at `sync` it survives a power cut when this returns.

        Args:
            value: bytes-like, up to 16 MiB; with a codec what that encodes.
            priority: 0 is the most urgent; up to the queue's `priorities` - 1.
            delay: seconds before which it is not delivered.
            at: time before which it is not: datetime, or int of microseconds since 1970 UTC.
            key: bytes-like; with ``ordering="key"`` messages of one key are done in their order.
            ttl: seconds after which it is not delivered any more; default the queue's.
            dedup_id: str or bytes: within the queue's `dedup_window` a second put of it stores
                nothing and returns the id of the first.
            headers: mapping of str to bytes-like.
            timeout: seconds to wait where the queue is full; None: as long as it takes.

        Raises: QueueFull after `timeout`, StoreFull, LimitExceeded, InvalidArgument, InvalidType,
        Closed, Unsupported (read-only); Poisoned, Indeterminate (a sync failed).

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("mail")
        ...     first, second = queue.put(b"a", priority=1), queue.put(b"b")
        ...     [m.value for m in queue.get_many(10)]
        [b'b', b'a']
        """
        cdef ms_instant now
        cdef ms_lease out
        cdef ms_error err
        cdef uint32_t owner = 0
        cdef int status
        self.alive()
        if timeout is not None:
            deadline_of(timeout)  # checked also where nothing is waited for
        if self.codec is not None:
            value = self.codec.encode(value)
        ms_now_near(&self.c, &now)
        status = self.put_one(value, priority, delay, at, key, ttl, dedup_id, headers, &now, &out,
                              &owner, &err)
        if status != MS_OK:
            self.put_slowly(value, priority, delay, at, key, ttl, dedup_id, headers, timeout,
                            status, owner, &out, &err)
        ms_queue_wake(&self.c, MS_WAIT_MESSAGE, 1)
        self.note()
        return out.id

    cdef int put_slowly(self, object value, object priority, object delay, object at, object key,
                        object ttl, object dedup_id, object headers, object timeout, int status,
                        uint32_t owner, ms_lease *out, ms_error *err) except -1:
        cdef ms_instant now
        cdef int64_t started = ms_clock_monotonic_ns()
        cdef int64_t deadline = started
        cdef bint announced = False
        cdef uint32_t ticket = 0
        if timeout is None or timeout > 0:
            deadline = deadline_of(timeout)
        while status != MS_OK:
            if self.resolve_put(status, owner, err, started, deadline, &announced, &ticket):
                raise _errors.QueueFull(
                    f"{self.path}: {self.c.capacity} messages are not finished")
            ms_now(&now)
            status = self.put_one(value, priority, delay, at, key, ttl, dedup_id, headers, &now,
                                  out, &owner, err)
        return 0

    def put_many(self, items, timeout=0):
        """Put many messages in one call, and return the ids of those that fitted, in order.

        Durability: as for `put`, for all of them when this returns.

        Args:
            items: iterable of values, or of dicts of `put`'s arguments (``{"value": b"...",
                "priority": 1}``; `timeout` is not one of them).
            timeout: seconds to wait in all where the queue is full; None: as long as it takes.

        Raises: as `put`, but for QueueFull. Where one raises, those before it were put.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     len(store.queue("mail").put_many([b"a", {"value": b"b", "delay": 60}]))
        2
        """
        cdef ms_instant now
        cdef ms_lease out
        cdef ms_error err
        cdef uint32_t owner = 0, ticket = 0
        cdef int status
        cdef int32_t count = 0
        cdef bint announced = False, full = False
        cdef list ids = []
        self.alive()
        cdef int64_t started = ms_clock_monotonic_ns()
        cdef int64_t deadline = started
        if timeout is None or timeout != 0:
            deadline = deadline_of(timeout)
        ms_now_near(&self.c, &now)
        try:
            for item in items:
                priority, delay, at, key = _ZERO, 0.0, None, None
                ttl = dedup_id = headers = None
                if type(item) is dict:
                    (value, priority, delay, at, key, ttl, dedup_id, headers) = put_arguments(item)
                else:
                    value = item
                if self.codec is not None:
                    value = self.codec.encode(value)
                while True:
                    status = self.put_one(value, priority, delay, at, key, ttl, dedup_id, headers,
                                          &now, &out, &owner, &err)
                    if status == MS_OK:
                        break
                    if count:
                        ms_queue_wake(&self.c, MS_WAIT_MESSAGE, count)
                        count = 0
                    full = self.resolve_put(status, owner, &err, started, deadline, &announced,
                                            &ticket)
                    if full:
                        break
                    ms_now(&now)
                if full:
                    break
                announced = False
                ids.append(out.id)
                count += 1
        finally:
            if count:
                ms_queue_wake(&self.c, MS_WAIT_MESSAGE, count)
            if ids:
                self.note()
        return ids

    # --- taking -----------------------------------------------------------------------------------

    cdef Message take(self, const ms_lease *lease, const ms_instant *now):
        """The leased message copied out; None where it was damaged (it is dead now) or lost."""
        cdef const ms_slot *slot = ms_queue_slot(&self.c, lease.slot)
        cdef uint32_t key_length = slot.key_length, headers_length = slot.headers_length
        cdef uint32_t length = slot.payload_length
        cdef uint64_t total = <uint64_t>key_length + headers_length + length
        cdef const uint8_t *content
        cdef Message m
        cdef bytes whole
        m = Message.__new__(Message)
        m.queue = self
        m.lease = lease[0]
        content = ms_queue_inline(&self.c, slot)
        if content != NULL:
            if total > self.c.slot_bytes - sizeof(ms_slot):
                return self.bury(lease, now)
            m.content = PyBytes_FromStringAndSize(
                <const char *>content + key_length + headers_length, length)
            if slot.key_hash != 0:
                m.key = PyBytes_FromStringAndSize(<const char *>content, key_length)
            if headers_length:
                m.packed = PyBytes_FromStringAndSize(<const char *>content + key_length,
                                                     headers_length)
        else:
            whole = self.copy_content(lease.slot, total)
            if whole is None:
                return self.bury(lease, now)
            m.content = whole
            if key_length + headers_length:
                m.content = whole[key_length + headers_length:]
                m.packed = whole[key_length:key_length + headers_length]
            if slot.key_hash != 0:
                m.key = whole[:key_length]
        m.put_us = slot.put_at
        m.ends_ns = now.mono_ns + self.lease_ms * 1000000
        m.priority = ms_word_lane(lease.word)
        m.attempt = ms_word_attempts(lease.word)
        if not ms_queue_holds(&self.c, lease):
            return None
        return m

    cdef bytes copy_content(self, uint32_t slot, uint64_t total):
        """Content in blocks, held to its hash; None where it is damaged."""
        cdef ms_error err
        cdef ms_status status
        if total > <uint64_t>0x7fffffff:
            return None
        cdef bytes whole = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
        cdef char *start = PyBytes_AS_STRING(whole)
        if total < COPY_BYTES:
            status = ms_queue_copy_content(&self.c, slot, start, <size_t>total, &err)
        else:
            with nogil:
                status = ms_queue_copy_content(&self.c, slot, start, <size_t>total, &err)
        return whole if status == MS_OK else None

    cdef Message bury(self, const ms_lease *lease, const ms_instant *now):
        """A damaged message goes to the dead letters."""
        cdef uint32_t owner = 0
        cdef bytes text = b"torn or corrupt"
        while ms_queue_holds(&self.c, lease):
            if ms_queue_try_reject(&self.c, lease, MS_FAILED_CORRUPT, PyBytes_AS_STRING(text),
                                   <size_t>len(text), now, &owner) != MS_BUSY:
                break
            self.outwait(owner)
        return None

    def get(self, *, timeout=None):
        """Lease the next message, waiting for one; use it in a `with`.

        The lease is the queue's `lease` seconds; where it ends before the message is finished, or
        its holder dies, the message is delivered again.

        Args:
            timeout: seconds to wait; 0: what is there now; None: as long as it takes.

        Returns: a `Message`. Raises: Empty after `timeout`; Closed, Unsupported (read-only).

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("mail")
        ...     _ = queue.put(b"hello")
        ...     with queue.get(timeout=5.0) as m:
        ...         print(m.value)
        ...     len(queue)
        b'hello'
        0
        """
        cdef ms_instant now
        cdef ms_lease lease
        cdef Message m
        self.alive()
        ms_now_near(&self.c, &now)
        if now.mono_ns - self.turned_at >= TURN_NS:
            if now.mono_ns - self.looked_at >= LOOK_NS:
                self.look(&now)
            else:
                self.turn(&now)
        if ms_queue_try_get(&self.c, self.lease_ms, &now, NULL, &lease) == MS_OK:
            m = self.take(&lease, &now)
            if m is not None:
                return m
        m = self.wait_for_one(timeout)
        if m is None:
            raise _errors.Empty(f"{self.path}: no message is ready")
        return m

    cdef Message wait_for_one(self, object timeout):
        """The next message, or None after the time-out."""
        cdef ms_instant now
        cdef ms_lease lease
        cdef Message m
        cdef int64_t deadline = deadline_of(timeout), most
        cdef uint32_t ticket = 0
        cdef bint waits = timeout is None or timeout > 0, slept = False
        while True:
            if waits:
                ticket = ms_queue_announce(&self.c, MS_WAIT_MESSAGE)
            ms_now(&now)
            self.look(&now)
            while ms_queue_try_get(&self.c, self.lease_ms, &now, NULL, &lease) == MS_OK:
                m = self.take(&lease, &now)
                if m is not None:
                    if slept and self.next_due != INT64_MAX:
                        # Who sleeps on may know of nothing that is due: somebody has to.
                        ms_queue_wake(&self.c, MS_WAIT_MESSAGE, 1)
                    return m
            if now.mono_ns >= deadline or not waits:
                return None
            most = self.slice(&now, deadline)
            with nogil:
                ms_queue_sleep(&self.c, MS_WAIT_MESSAGE, ticket, most)
            slept = True
            PyErr_CheckSignals()
            self.alive()

    def get_many(self, count, *, timeout=None):
        """Lease what is there, up to `count` messages: at least one, or [] after the time-out.

        A message that has failed before comes alone.

        Args:
            count: at most so many.
            timeout: seconds to wait for the first; None: as long as it takes.

        Raises: Closed, Unsupported (read-only).
        """
        cdef ms_instant now
        cdef ms_lease lease
        cdef Message m
        cdef cbool alone
        cdef list found = []
        cdef Py_ssize_t most
        try:
            most = PyNumber_Index(count)
        except TypeError as error:
            raise _errors.InvalidType(f"count {count!r}: expected an int") from error
        if most < 1:
            raise _errors.InvalidArgument(f"count {count}: expected at least 1")
        self.alive()
        ms_now_near(&self.c, &now)
        if now.mono_ns - self.turned_at >= TURN_NS:
            if now.mono_ns - self.looked_at >= LOOK_NS:
                self.look(&now)
            else:
                self.turn(&now)
        m = None
        if ms_queue_try_get(&self.c, self.lease_ms, &now, NULL, &lease) == MS_OK:
            m = self.take(&lease, &now)
        if m is None:
            m = self.wait_for_one(timeout)
            if m is None:
                return found
            ms_now_near(&self.c, &now)
        found.append(m)
        if m.attempt > 1:
            return found
        while len(found) < most:
            alone = True
            if ms_queue_try_get(&self.c, self.lease_ms, &now, &alone, &lease) != MS_OK:
                break
            m = self.take(&lease, &now)
            if m is not None:
                found.append(m)
        return found

    def ack_many(self, messages):
        """Acknowledge many, and return those whose lease was lost before.

        Durability: as of the queue, like `put`.
        """
        cdef ms_instant now
        cdef Message m
        cdef uint32_t owner = 0
        cdef ms_status status
        cdef list lost = []
        self.alive()
        ms_now_near(&self.c, &now)
        for item in messages:
            if type(item) is not Message:
                raise _errors.InvalidType(
                    f"expected messages, found {type(item).__name__}")
            m = <Message>item
            if m.queue is not self and m.queue.c.slots.queue_id != self.c.slots.queue_id:
                raise _errors.InvalidArgument(f"{m!r} is a message of another queue")
        for item in messages:
            m = <Message>item
            if m.keeper != NULL:
                m.claim()
            status = ms_queue_try_ack(&self.c, &m.lease, &now, &owner)
            while status == MS_BUSY:
                self.outwait(owner)
                status = ms_queue_try_ack(&self.c, &m.lease, &now, &owner)
            if status == MS_OK:
                m.outcome = "ack"
            elif m.settle(status, "ack", False):
                lost.append(m)
        self.note()
        return lost

    # --- waiting for others -----------------------------------------------------------------------

    def _announce(self, str place):
        """Say that one will wait at a place: look again after it, then sleep with the ticket."""
        return ms_queue_announce(&self.c, PLACES[place])

    def _sleep(self, str place, uint32_t ticket, double timeout):
        """Sleep until woken, at most `timeout` seconds, maybe less."""
        cdef ms_instant now
        cdef int where = PLACES[place]
        cdef int64_t most
        ms_now(&now)
        most = self.slice(&now, now.mono_ns + <int64_t>(min(timeout, 1e9) * 1e9))
        with nogil:
            ms_queue_sleep(&self.c, where, ticket, most)
        PyErr_CheckSignals()

    # --- looking ----------------------------------------------------------------------------------

    def _counts(self):
        """How many messages are in which state; `by_lane` are the ready ones."""
        cdef ms_queue_counts counts
        self.visible()
        with nogil:
            ms_queue_count(&self.c, &counts)
        return {
            "ready": counts.ready, "delayed": counts.delayed, "held": counts.held,
            "leased": counts.leased, "writing": counts.writing, "dead": counts.dead,
            "spare": counts.spare, "free": counts.free, "prepared": counts.prepared,
            "acking": counts.acking, "invalid": counts.invalid,
            "by_lane": [counts.by_lane[i] for i in range(self.c.lanes)],
        }

    def __len__(self):
        cdef ms_queue_counts counts
        self.visible()
        ms_queue_count(&self.c, &counts)
        return (counts.ready + counts.delayed + counts.held + counts.leased + counts.prepared +
                counts.acking)

    def __bool__(self):
        return True

    def _scan(self, states):
        """(lane, id, slot, word) of each message in one of the states."""
        cdef uint32_t i, mask = 0
        cdef uint64_t word
        cdef list found = []
        self.visible()
        for name in states:
            mask |= <uint32_t>1 << <uint32_t>STATES[name]
        for i in range(ms_load32(&self.c.slots.slot_count)):
            word = ms_load64(ms_queue_word(&self.c, i))
            if mask >> ms_word_state(word) & 1:
                found.append((ms_word_lane(word), ms_queue_slot(&self.c, i).id, i, word))
        return found

    def _find(self, uint64_t id):
        """(slot, word) of a message that is not finished, or None."""
        cdef uint64_t word = 0
        cdef uint32_t slot
        self.visible()
        with nogil:
            slot = ms_queue_find(&self.c, id, &word)
        return None if slot == UINT32_MAX else (slot, word)

    def _record(self, uint32_t index, uint64_t word):
        """A message as it lies there, without taking it; None: it is another one by now.

        (id, state, priority, attempts, put_at, due, expires, key, headers, data); data None: it is
        damaged.
        """
        cdef const ms_slot *slot
        cdef uint32_t key_length, headers_length, length
        cdef uint64_t total, after
        cdef const uint8_t *content
        cdef bytes whole = None
        cdef tuple fields
        cdef bint has_key
        self.visible()
        if index >= ms_load32(&self.c.slots.slot_count):
            return None
        slot = ms_queue_slot(&self.c, index)
        key_length = slot.key_length
        headers_length = slot.headers_length
        length = slot.payload_length
        total = <uint64_t>key_length + headers_length + length
        fields = (slot.id, STATE_NAMES.get(ms_word_state(word), "invalid"), ms_word_lane(word),
                  ms_word_attempts(word), slot.put_at, slot.due, slot.expires)
        has_key = slot.key_hash != 0
        if ms_queue_slot_valid(&self.c, index, ms_word_reuse(word)):
            content = ms_queue_inline(&self.c, slot)
            if content == NULL:
                whole = self.copy_content(index, total)
            elif total <= self.c.slot_bytes - sizeof(ms_slot):
                whole = PyBytes_FromStringAndSize(<const char *>content, <Py_ssize_t>total)
        ms_fence()
        after = ms_load64(ms_queue_word(&self.c, index))
        if ms_word_reuse(after) != ms_word_reuse(word) or ms_word_state(after) in (0, 3):
            return None
        if whole is None:
            return fields + (None, {}, None)
        return fields + (whole[:key_length] if has_key else None,
                         unpack_headers(whole[key_length:key_length + headers_length]),
                         whole[key_length + headers_length:])

    def _failure(self, uint32_t slot, uint64_t id):
        """(first_at, last_at, attempts, kind, first, last) of a message's failures, or None."""
        cdef ms_failure failure
        self.visible()
        if slot >= ms_load32(&self.c.slots.slot_count) or \
                not ms_queue_failure(&self.c, slot, id, &failure):
            return None
        first = PyBytes_FromStringAndSize(<const char *>failure.first,
                                          min(failure.first_length, FAILURE_TEXT))
        last = PyBytes_FromStringAndSize(<const char *>failure.last,
                                         min(failure.last_length, FAILURE_TEXT))
        return (failure.first_at, failure.last_at, failure.attempts, failure.kind,
                first.decode("utf-8", "replace"), last.decode("utf-8", "replace"))

    def _cancel(self, uint32_t slot, uint64_t word):
        """Finish a message that nobody has leased; False: it is in another state now."""
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef ms_status status
        self.alive()
        ms_now(&now)
        while True:
            status = ms_queue_try_cancel(&self.c, slot, word, &now, &owner)
            if status != MS_BUSY:
                break
            self.outwait(owner)
        if status == MS_OK:
            self.note()
        return status == MS_OK

    def _redrive(self, uint32_t slot, uint64_t word):
        """A dead letter becomes ready; False: it is none any more. Raises QueueFull."""
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef ms_status status
        self.alive()
        ms_now(&now)
        while True:
            status = ms_queue_try_redrive(&self.c, slot, word, &now, &owner)
            if status == MS_GROW_SLOTS:
                self._grow_slots(ms_load32(&self.c.slots.slot_count))
                continue
            if status != MS_BUSY:
                break
            self.outwait(owner)
        if status == MS_FULL:
            raise _errors.QueueFull(f"{self.path}: {self.c.capacity} messages are not finished")
        if status == MS_OK:
            self.note()
        return status == MS_OK

    def _check(self):
        """Raise AssertionError unless the invariants of the files hold. At rest only."""
        cdef char text[512]
        text[0] = 0
        if not ms_queue_check(&self.c, text, sizeof(text)):
            raise AssertionError((<bytes>text).decode("utf-8", "replace"))


cdef tuple put_arguments(dict item):
    """The arguments of `put` that a dict has, in order."""
    unknown = item.keys() - PUT_NAMES
    if unknown:
        raise _errors.InvalidArgument(f"{sorted(map(str, unknown))[0]!r} is no argument of put")
    if "value" not in item:
        raise _errors.InvalidArgument("a dict of put's arguments needs a value")
    return (item["value"], item.get("priority", 0), item.get("delay", 0.0), item.get("at"),
            item.get("key"), item.get("ttl"), item.get("dedup_id"), item.get("headers"))


cdef frozenset PUT_NAMES = frozenset(
    ("value", "priority", "delay", "at", "key", "ttl", "dedup_id", "headers"))
cdef dict PLACES = {"message": MS_WAIT_MESSAGE, "room": MS_WAIT_ROOM, "settled": MS_WAIT_SETTLED}
cdef dict STATES = {
    "free": MS_MESSAGE_FREE, "writing": MS_MESSAGE_WRITING, "ready": MS_MESSAGE_READY,
    "delayed": MS_MESSAGE_DELAYED, "leased": MS_MESSAGE_LEASED, "dead": MS_MESSAGE_DEAD,
    "spare": MS_MESSAGE_SPARE, "held": MS_MESSAGE_HELD, "prepared": MS_MESSAGE_PREPARED,
    "acking": MS_MESSAGE_ACKING}
cdef dict STATE_NAMES = {value: name for name, value in STATES.items()}


def queue_sizes(uint32_t slot_bytes, uint32_t slot_count, uint32_t block_count, uint32_t slot_max,
                uint32_t lanes, bint ordered):
    """Bytes of (slots with slot_count, blocks with block_count, hints)."""
    return (ms_slots_size(slot_bytes, slot_count), ms_blocks_size(block_count),
            ms_hints_size(slot_max, lanes, ordered))
