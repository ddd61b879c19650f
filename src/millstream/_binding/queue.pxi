# The hot methods of a queue: putting, taking, waiting (ms_queue.h). What is not hot, or needs the
# file system, is in queues/handle.py, which these call through the hooks.
from cpython.exc cimport PyErr_Clear

cdef extern from "Python.h":
    PyObject *number_from "PyLong_FromUnsignedLongLong"(unsigned long long value)


# What a put has found so far: room, or none; once announced it tries once more before it waits.
cdef enum: ROOM, ANNOUNCED, FULL


# What a transaction knows of a message before it is put.
cdef struct PreparedPut:
    uint64_t transaction
    uint64_t id
    uint32_t slot
    int64_t due_us
    int64_t expires_us


@cython.final
@cython.freelist(64)
cdef class Put:
    """An item of `Queue.put_many` with arguments of its own: those of `Queue.put`, but `timeout`.

    They are checked when it is put. Compares, pickles; cannot be changed.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     jobs = store.queue("jobs", codec="json")
    ...     ids = jobs.put_many([{"to": "ann"}, millstream.Put({"to": "bob"}, priority=0)])
    ...     [m.value["to"] for m in jobs.get_many(2)]
    ['ann', 'bob']
    """
    cdef readonly object value
    cdef readonly object priority
    cdef readonly object delay
    cdef readonly object at
    cdef readonly object key
    cdef readonly object ttl
    cdef readonly object dedup_id
    cdef readonly object headers

    def __init__(self, value, *, priority=0, delay=0.0, at=None, key=None, ttl=None, dedup_id=None,
                 headers=None):
        self.value = value
        self.priority = priority
        self.delay = delay
        self.at = at
        self.key = key
        self.ttl = ttl
        self.dedup_id = dedup_id
        self.headers = headers

    def _arguments(self):
        """What it was made with beside the value, where that is not what `put` takes anyway."""
        given = {"priority": self.priority, "delay": self.delay, "at": self.at, "key": self.key,
                 "ttl": self.ttl, "dedup_id": self.dedup_id, "headers": self.headers}
        return {name: one for name, one in given.items()
                if one is not None and not (name in ("priority", "delay") and one == 0)}

    def __eq__(self, other):
        if type(other) is not Put:
            return NotImplemented
        return (self.value, self._arguments()) == (other.value, (<Put>other)._arguments())

    __hash__ = None

    def __repr__(self):
        given = "".join(f", {name}={_short(one)}" for name, one in self._arguments().items())
        return f"Put({_short(self.value)}{given})"

    def __reduce__(self):
        return Put._again, (self.value, self._arguments())

    @staticmethod
    def _again(value, arguments):
        return Put(value, **arguments)


def _short(value):
    """As it is, where that is short: values may have megabytes."""
    if isinstance(value, (bytes, bytearray, str)) and len(value) > <Py_ssize_t>REPR_KEY:
        return f"{value[:REPR_KEY]!r}... of {len(value)}"
    text = repr(value)
    return text if len(text) <= 2 * <Py_ssize_t>REPR_KEY else f"{text[:2 * REPR_KEY]}..."


cdef int check_many(object items, str what, str single) except -1:
    """Refuse one value where many are expected: a text, say, would be put in pieces."""
    if isinstance(items, (str, bytes, bytearray, memoryview, dict)):
        raise _errors.InvalidType(f"{what}: expected an iterable of values, found one "
                                  f"{type(items).__name__}; {single}() takes a single value")
    try:
        iter(items)
    except TypeError as error:
        raise _errors.InvalidType(f"{what}: expected an iterable of values, found "
                                  f"{type(items).__name__}") from error
    return 0


cdef class QueueCore(_QueueFiles):
    """Base of `millstream.Queue`: putting and taking.

    Hooks of the subclass: ``_grow_blocks(count)``, ``_grow_dedup()``, ``_retry_delay(attempt)``,
    ``_keep_traceback(id, error)``,
    ``_due(at)``, and those of its base.
    """
    # --- putting ----------------------------------------------------------------------------------

    cdef int put_one(self, object value, object priority, object delay, object at, object key,
                     object ttl, object dedup_id, object headers, const ms_instant *now,
                     const PreparedPut *prepared, ms_lease *out, uint32_t *out_owner,
                     ms_error *err) except? -1000:
        """Put one message; the status of the core."""
        cdef ms_message message
        cdef bytes data, key_bytes, packed
        cdef int64_t due, left
        cdef uint64_t total
        memset(&message, 0, sizeof(ms_message))
        if type(value) is bytes:
            data = value
        elif isinstance(value, dict):
            raise _errors.InvalidType(
                "value: a dict, and the queue has no codec; for arguments of put in put_many write"
                " millstream.Put(value, ...), to store the dict open the queue with codec=\"json\"")
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
                message.due_us = now.time_us + message.delay_ns // 1000
        if at is not None:
            if message.delay_ns:
                raise _errors.InvalidArgument("give a delay or a time, not both")
            due = self._due(at)
            left = due - ms_clock_wall_us()
            if left > DELAY_MOST_US:
                raise _errors.InvalidArgument(f"at {at!r}: more than 100 years from now")
            if left > 0:
                message.due_us = due
                message.absolute = True
                message.delay_ns = left * 1000
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
            message.expires_us = now.time_us + microseconds_of("ttl", ttl)
        elif self.ttl_us:
            message.expires_us = now.time_us + self.ttl_us
        if prepared != NULL:
            message.transaction = prepared.transaction
            message.id = prepared.id
            message.slot = prepared.slot
            message.expires_us = prepared.expires_us
            if prepared.due_us > now.time_us:
                message.due_us = prepared.due_us
                message.delay_ns = (prepared.due_us - now.time_us) * 1000
        if dedup_id is not None:
            if self.dedup is None:
                raise _errors.InvalidArgument(
                    f"{self.path}: the queue was made without a dedup_window, so that a dedup_id"
                    " would do nothing")
            if type(dedup_id) is tuple:  # as a transaction's record has it
                message.dedup[0], message.dedup[1] = dedup_id
            else:
                self.hash_dedup(dedup_id, message.dedup)
        total = <uint64_t>message.key_length + message.headers_length + message.payload_length
        if total > self.c.slot_bytes - sizeof(ms_slot) and \
                total > <uint64_t>self.c.block_max * 4096:
            raise _errors.LimitExceeded(
                f"a message of {total} bytes: more than a slot, and all blocks, hold")
        return ms_queue_try_put(&self.c, &message, now, out, out_owner, err)

    cdef object encoded(self, object value):
        """What the codec makes of it."""
        if type(value) is Put:
            raise _errors.InvalidType("value: a Put is an item of put_many; give put its arguments")
        value = self.codec.encode(value)
        self.alive()  # it is a user's, and may have closed the store
        return value

    cdef int hash_dedup(self, object dedup_id, uint64_t *out) except -1:
        cdef bytes text
        if isinstance(dedup_id, str):
            text = utf8("dedup_id", dedup_id)
        else:
            text = as_bytes(dedup_id, "dedup_id")
        out[0] = ms_xxh3_64(PyBytes_AS_STRING(text), <size_t>PyBytes_GET_SIZE(text), 0)
        out[1] = ms_xxh3_64(PyBytes_AS_STRING(text), <size_t>PyBytes_GET_SIZE(text),
                            0x9e3779b97f4a7c15)
        out[0] += out[0] == 0
        return 0

    def _dedup_key(self, dedup_id):
        """The two hashes of an id."""
        cdef uint64_t found[2]
        self.hash_dedup(dedup_id, found)
        return found[0], found[1]

    cdef uint32_t lane_of(self, object priority) except? 0xffffffff:
        found = index_of("priority", priority)
        if not 0 <= found < self.c.lanes:
            raise _errors.InvalidArgument(
                f"priority {priority}: the queue has priorities 0 to {self.c.lanes - 1}")
        return found

    cdef int resolve_put(self, int status, uint32_t owner, const ms_error *err, int64_t started,
                         int64_t deadline, int *io_found, uint32_t *io_ticket) except -1:
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
        elif status == MS_ROLL:
            self._grow_dedup()
        elif status == MS_BUSY:
            self.outwait(owner)
            if ms_clock_monotonic_ns() - started > <int64_t>OWNER_NS:
                raise _errors.LockTimeout(f"{self.path}: held by {self.members.describe(owner)}")
        else:
            ms_now(&self.c, &now)
            if io_found[0] == ROOM:
                ms_queue_refuse(&self.c)
            if io_found[0] == ANNOUNCED:
                io_found[0] = FULL
                if now.mono_ns >= deadline:
                    return 1
                most = min(<int64_t>UPKEEP_NS, deadline - now.mono_ns)
                self.rest(MS_WAIT_ROOM, io_ticket[0], most)
            elif deadline <= started:  # it does not wait
                self.upkeep(&now)
                io_found[0] = ANNOUNCED  # once more, then it is over
                io_ticket[0] = 0
            else:
                io_ticket[0] = ms_queue_announce(&self.c, MS_WAIT_ROOM)
                io_found[0] = ANNOUNCED
                self.upkeep(&now)
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
        Closed, Unsupported (read-only); Poisoned, Indeterminate (a sync failed). What the codec
        raises for a value comes out as it is (`TypeError` of `codec="json"`); nothing is stored.

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
            value = self.encoded(value)
        ms_now_near(&self.c, &now)
        status = self.put_one(value, priority, delay, at, key, ttl, dedup_id, headers, &now, NULL,
                              &out, &owner, &err)
        if status != MS_OK and status != MS_END:
            self.put_slowly(value, priority, delay, at, key, ttl, dedup_id, headers, timeout,
                            status, owner, &out, &err)
            ms_now_near(&self.c, &now)
        ms_queue_wake(&self.c, MS_WAIT_MESSAGE, 1)
        self.sync_change(&now)
        cdef PyObject *made = number_from(out.id)
        if made == NULL:
            self.without_memory()
        found = <object>made
        Py_DECREF(found)
        return found

    cdef int without_memory(self) except -1:
        """A message is stored, and there is no memory for its id."""
        PyErr_Clear()
        raise self.uncertain(MemoryError())

    cdef int put_slowly(self, object value, object priority, object delay, object at, object key,
                        object ttl, object dedup_id, object headers, object timeout, int status,
                        uint32_t owner, ms_lease *out, ms_error *err) except -1:
        cdef ms_instant now
        cdef int64_t started = ms_clock_monotonic_ns()
        cdef int64_t deadline = started
        cdef int found = ROOM
        cdef uint32_t ticket = 0
        if timeout is None or timeout > 0:
            deadline = deadline_of(timeout)
        while status != MS_OK and status != MS_END:
            if self.resolve_put(status, owner, err, started, deadline, &found, &ticket):
                raise _errors.QueueFull(
                    f"{self.path}: {self.c.capacity} messages are not finished")
            ms_now(&self.c, &now)
            status = self.put_one(value, priority, delay, at, key, ttl, dedup_id, headers, &now,
                                  NULL, out, &owner, err)
        return 0

    def put_many(self, items, timeout=0):
        """Put many messages in one call, and return the ids of those that fitted, in order.

        Durability: as for `put`, for all of them when this returns.

        Args:
            items: iterable of values, as `put` takes them, or of `Put`, where one has arguments of
                its own.
            timeout: seconds to wait in all where the queue is full; None: as long as it takes.

        Raises: as `put`, but for QueueFull; InvalidType for one dict, string or bytes. Where one
        raises, those before it were put.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     len(store.queue("mail").put_many([b"a", millstream.Put(b"b", delay=60)]))
        2
        """
        cdef ms_instant now
        cdef ms_lease out
        cdef ms_error err
        cdef uint32_t owner = 0, ticket = 0
        cdef int status
        cdef int32_t count = 0
        cdef int found = ROOM
        cdef bint full = False, behind = False
        cdef list ids = []
        cdef Put arguments
        self.alive()
        cdef int64_t started = ms_clock_monotonic_ns()
        cdef int64_t deadline = started
        if timeout is None or timeout != 0:
            deadline = deadline_of(timeout)
        cdef bint plain = True
        priority, delay, at, key = _ZERO, 0.0, None, None
        ttl = dedup_id = headers = None
        cdef bint foreign = type(items) is not list and type(items) is not tuple
        if foreign:
            check_many(items, "items", "put")
        ms_now_near(&self.c, &now)
        try:
            for item in items:
                if foreign:
                    self.alive()  # whose iterator it is may have closed the store
                if type(item) is Put:
                    arguments = <Put>item
                    value, priority, delay = arguments.value, arguments.priority, arguments.delay
                    at, key, ttl = arguments.at, arguments.key, arguments.ttl
                    dedup_id, headers = arguments.dedup_id, arguments.headers
                    plain = False
                else:
                    value = item
                    if not plain:  # to count references for each item takes 8 ns
                        priority, delay, at, key = _ZERO, 0.0, None, None
                        ttl = dedup_id = headers = None
                        plain = True
                if self.codec is not None:
                    value = self.encoded(value)
                while True:
                    status = self.put_one(value, priority, delay, at, key, ttl, dedup_id, headers,
                                          &now, NULL, &out, &owner, &err)
                    if status == MS_OK or status == MS_END:
                        break
                    if count:
                        ms_queue_wake(&self.c, MS_WAIT_MESSAGE, count)
                        count = 0
                        if self.level == 1:
                            self.sync_change(&now)  # it may be long until there is room
                    full = self.resolve_put(status, owner, &err, started, deadline, &found,
                                            &ticket)
                    if full:
                        break
                    ms_now(&self.c, &now)
                if full:
                    break
                found = ROOM
                count += 1
                behind = True
                ids.append(out.id)
                behind = False
        except MemoryError as error:
            if not behind:
                raise
            raise self.uncertain(error)
        finally:
            if count:
                ms_queue_wake(&self.c, MS_WAIT_MESSAGE, count)
            if ids:
                self.sync_change(&now)
        return ids

    # --- transactions: docs/design.md -------------------------------------------------------------

    def _prepare_put(self, uint64_t transaction, uint64_t id, value, *, priority=0, int64_t due=0,
                     bint absolute=False, key=None, int64_t expires=0, dedup_id=None, headers=None,
                     uint32_t slot=0):
        """Put a message that nobody sees before `_decide`: (id, slot, word).

        None: one with its dedup_id is there. `id`: 0, or as it was given before, then in `slot` if
        that is free. `transaction` 0: it is decided, and seen at once. `due`, unless `absolute`,
        and `expires` are times of the store's clock; 0: none. Raises QueueFull; never waits for
        room.
        """
        cdef PreparedPut prepared
        prepared.transaction, prepared.id, prepared.slot = transaction, id, slot
        prepared.due_us, prepared.expires_us = 0 if absolute else due, expires
        at = due if absolute else None
        cdef ms_instant now
        cdef ms_lease out
        cdef ms_error err
        cdef uint32_t owner = 0
        cdef int64_t started = ms_clock_monotonic_ns()
        cdef int status
        cdef int found = ROOM
        cdef uint32_t ticket = 0
        self.alive()
        while True:
            ms_now(&self.c, &now)
            status = self.put_one(value, priority, 0.0, at, key, None, dedup_id, headers, &now,
                                  &prepared, &out, &owner, &err)
            if status == MS_OK:
                break
            if status == MS_END:
                return None
            if self.resolve_put(status, owner, &err, started, started, &found, &ticket):
                raise _errors.QueueFull(
                    f"{self.path}: {self.c.capacity} messages are not finished")
        if transaction == 0:
            ms_queue_wake(&self.c, MS_WAIT_MESSAGE, 1)
        self.change_in_journal(&now)
        return out.id, out.slot, out.word

    def _prepare_ack(self, uint64_t transaction, Message m):
        """Make the lease an acknowledgement that waits to be decided: (id, slot, word); None: lost.
        """
        cdef ms_instant now
        cdef uint64_t word = 0
        self.alive()
        if m.keeper != NULL:
            m.claim()
        ms_now(&self.c, &now)
        if ms_queue_try_prepare_ack(&self.c, &m.lease, transaction, &now, &word) != MS_OK:
            return None
        return m.lease.id, m.lease.slot, word

    def _undo_ack(self, Message m, uint64_t word):
        """Make it a lease again, as before `_prepare_ack`; False: somebody has finished it."""
        self.changes()
        return ms_queue_try_undo_ack(&self.c, &m.lease, word) == MS_OK

    def _acked(self, Message m):
        """The transaction that acknowledges it is committed."""
        m.outcome = "ack"

    def _decide(self, uint32_t slot, uint64_t word, bint committed):
        """Show what was prepared, or withdraw it. False: it is decided already."""
        cdef ms_instant now
        cdef uint32_t owner = 0
        cdef ms_status status
        self.alive()
        if slot >= ms_load32(&self.c.slots.slot_count):  # of a journal, which may be damaged
            return False
        while True:
            ms_now(&self.c, &now)
            status = ms_queue_try_decide(&self.c, slot, word, committed, &now, &owner)
            if status != MS_BUSY:
                break
            self.outwait(owner)
        self.change_in_journal(&now)
        return status == MS_OK

    def _fate_of(self, uint32_t slot, uint64_t id, uint64_t prepared):
        """"whole", "torn", "over" or "never": a message of a transaction, in the slot that it got.

        After all processes had ended, maybe by a power cut.
        """
        cdef uint64_t word, found
        if slot >= ms_load32(&self.c.slots.slot_count):
            return "never"
        word = ms_load64(ms_queue_word(&self.c, slot))
        found = ms_queue_slot(&self.c, slot).id
        if ms_word_state(word) not in NO_MESSAGE and (found in (id, 0) or word == prepared):
            record = self._record(slot, word)
            return "torn" if found != id or record is None or record[9] is None else "whole"
        return "over" if ms_queue_had(&self.c, slot, id) else "never"

    def _wipe(self, uint32_t slot):
        """Take the id from a torn message; next the caller syncs that, then calls `_forget`."""
        self.changes()
        ms_queue_wipe(&self.c, slot)

    def _forget(self, uint32_t slot):
        """Free the slot of a message that was wiped."""
        self.changes()
        cdef ms_instant now
        ms_now(&self.c, &now)
        ms_queue_forget(&self.c, slot, &now)

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
        if timeout is not None:
            deadline_of(timeout)  # checked also where nothing is waited for
        ms_now_near(&self.c, &now)
        if now.mono_ns - self.advanced_at >= <int64_t>ADVANCE_NS:
            if now.mono_ns - self.upkeep_at >= <int64_t>UPKEEP_NS:
                self.upkeep(&now)
            else:
                self.advance(&now)
        if ms_queue_try_get(&self.c, self.lease_ms, &now, NULL, &lease) == MS_OK:
            m = self.take(&lease, &now)
            if m is not None:
                return m
        m = self.wait_for_one(timeout)
        if m is None:
            raise _errors.Empty(f"{self.path}: no message is ready")
        return m

    cdef Message next_one(self, const ms_instant *now):
        """The next message that is ready, or None."""
        cdef ms_lease lease
        cdef Message m
        while ms_queue_try_get(&self.c, self.lease_ms, now, NULL, &lease) == MS_OK:
            m = self.take(&lease, now)
            if m is not None:
                return m
        return None

    cdef Message wait_for_one(self, object timeout):
        """The next message, or None after the time-out."""
        cdef ms_instant now
        cdef Message m
        cdef int64_t deadline = deadline_of(timeout)
        cdef uint32_t ticket = 0
        cdef bint waits = timeout is None or timeout > 0, slept = False
        cdef int64_t patient = INT64_MAX
        while True:
            if waits:
                ticket = ms_queue_announce(&self.c, MS_WAIT_MESSAGE)
            ms_now(&self.c, &now)
            m = None
            if slept:  # take what woke us before the upkeep, which asks the kernel for deaths
                self.advance(&now)
                m = self.next_one(&now)
            if m is None:
                self.upkeep(&now)
                m = self.next_one(&now)
            if m is not None:
                if slept and self.next_due != INT64_MAX:
                    # Somebody must wake for what is due next; those that sleep may not know of it.
                    ms_queue_wake(&self.c, MS_WAIT_MESSAGE, 1)
                return m
            if self._surprise != 0:
                patient = min(patient, now.mono_ns + <int64_t>SURPRISE_NS)
                if now.mono_ns >= min(deadline, patient) or not waits:
                    self._point_out()
            if now.mono_ns >= deadline or not waits:
                if slept:  # what woke us may be for those that still sleep
                    ms_queue_wake(&self.c, MS_WAIT_MESSAGE, 1)
                return None
            self.rest(MS_WAIT_MESSAGE, ticket, self.slice(&now, deadline))
            slept = True
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
        wanted = index_of("count", count)
        if wanted < 1:
            raise _errors.InvalidArgument(f"count {count}: expected at least 1")
        most = min(wanted, 1 << 24)  # no queue has more slots
        self.alive()
        ms_now_near(&self.c, &now)
        if now.mono_ns - self.advanced_at >= <int64_t>ADVANCE_NS:
            if now.mono_ns - self.upkeep_at >= <int64_t>UPKEEP_NS:
                self.upkeep(&now)
            else:
                self.advance(&now)
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
        """Acknowledge many, and return those whose lease was lost before: they may come again.

        One that this object had acknowledged already, say because it is given twice, is not lost.

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
        try:
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
                elif m.ended(status, "ack", False) and (m.was_lost or m.outcome != "ack"):
                    lost.append(m)
        finally:  # those before the one that failed are acknowledged
            self.sync_change(&now)
        return lost

    # --- waiting for others -----------------------------------------------------------------------

    def _announce(self, str place):
        """Say that one will wait at a place: check again after it, then sleep with the ticket."""
        self.alive()
        return ms_queue_announce(&self.c, PLACES[place])

    def _sleep(self, str place, uint32_t ticket, double timeout):
        """Sleep until woken, at most `timeout` seconds, maybe less."""
        cdef ms_instant now
        ms_now(&self.c, &now)
        self.rest(PLACES[place], ticket,
                  self.slice(&now, now.mono_ns + <int64_t>(min(timeout, 1e9) * 1e9)))

    cdef int rest(self, int place, uint32_t ticket, int64_t most) except -1:
        """Sleep until woken, for `most` nanoseconds, or until a signal comes."""
        cdef ms_queue c
        room = room_of_greenlets()
        if room is not None:
            room(self._rest_here, (place, ticket, most))
            return 0
        c = self.c  # which another thread may replace meanwhile
        with nogil:
            ms_queue_sleep(&c, place, ticket, most)
        PyErr_CheckSignals()
        return 0

    def _rest_here(self, int place, uint32_t ticket, int64_t most):
        cdef ms_queue c = self.c
        with nogil:
            ms_queue_sleep(&c, place, ticket, most)


cdef frozenset NO_MESSAGE = frozenset((MS_MESSAGE_FREE, MS_MESSAGE_WRITING, MS_MESSAGE_SPARE))
