# ms_latest.h: the last value of each key, and how batches get there
@cython.freelist(4)
cdef class Latest:
    """Keys and their last values, as a mapping of bytes to bytes; base of `millstream.View`.

    Where it has `ended`, every use raises that.
    """
    cdef ms_latest c
    cdef uint32_t fork
    cdef object why  # what every use raises

    def __cinit__(self, *_, **__):
        memcpy(&self.c.seed, PyBytes_AS_STRING(_os.urandom(8)), 8)
        self.fork = ms_fork_count()

    def __dealloc__(self):
        ms_latest_clear(&self.c)

    @property
    def ended(self):
        """What every use raises, or None."""
        if self.why is None and self.fork != ms_fork_count():
            self.why = _errors.Closed(
                "the view was inherited through a fork; open the store again in the child")
        return self.why

    cdef int alive(self) except -1:
        if self.why is not None or self.fork != ms_fork_count():
            raise self.ended.with_traceback(None)
        return 0

    cdef const ms_latest_record *find(self, object key) except? NULL:
        cdef Py_buffer buffer
        cdef const ms_latest_record *found
        self.alive()
        if type(key) is bytes:
            return ms_latest_find(&self.c, <const uint8_t *>PyBytes_AS_STRING(key),
                                  <uint32_t>PyBytes_GET_SIZE(key))
        if not PyObject_CheckBuffer(key):
            raise _errors.InvalidType(f"key {key!r:.80}: expected bytes-like")
        try:
            PyObject_GetBuffer(key, &buffer, PyBUF_SIMPLE)
        except (BufferError, ValueError) as error:
            raise _errors.InvalidType(f"key: not contiguous bytes: {error}") from error
        found = ms_latest_find(&self.c, <const uint8_t *>buffer.buf, <uint32_t>buffer.len)
        PyBuffer_Release(&buffer)
        return found

    def __getitem__(self, key):
        """The last value of a key; KeyError where it has none."""
        cdef const ms_latest_record *found = self.find(key)
        if found == NULL:
            raise KeyError(key)
        return PyBytes_FromStringAndSize(<const char *>ms_latest_value(found), found.value_size)

    def get(self, key, default=None):
        """The last value of a key, or the default."""
        cdef const ms_latest_record *found = self.find(key)
        if found == NULL:
            return default
        return PyBytes_FromStringAndSize(<const char *>ms_latest_value(found), found.value_size)

    def __contains__(self, key):
        return self.find(key) != NULL

    def __len__(self):
        self.alive()
        return self.c.count

    def as_dict(self):
        """All keys and values as they are now."""
        cdef dict found = {}
        cdef const ms_latest_record *record
        cdef uint64_t i
        self.alive()
        for i in range(self.c.capacity):
            record = self.c.entries[i].record
            if record != NULL:
                found[key_bytes(record)] = PyBytes_FromStringAndSize(
                    <const char *>ms_latest_value(record), record.value_size)
        return found

    def key_list(self):
        """All keys as they are now."""
        cdef uint64_t i
        self.alive()
        return [key_bytes(self.c.entries[i].record) for i in range(self.c.capacity)
                if self.c.entries[i].record != NULL]

    def _adopt(self, Latest other not None):
        """Have what the other one has; that has what this one had."""
        self.c, other.c = other.c, self.c

    def _end(self, error):
        """Raise the error at every use from now on, and give the memory back."""
        self.why = error
        ms_latest_clear(&self.c)

    cdef int put(self, const uint8_t *key, uint32_t key_size, const uint8_t *value,
                 uint32_t value_size, ms_latest_origin origin) except -1:
        if ms_latest_put(&self.c, key, key_size, value, value_size, origin) != MS_OK:
            raise MemoryError
        return 0

    def _apply(self, Batch batch not None, uint32_t partitions, uint64_t end, dict strays):
        """Take over the records before offset `end` that are the last of their key.

        While all is loaded `strays` collects those whose key belongs to another partition, as
        (timestamp, value, partition); else it is None.
        """
        cdef uint32_t at, size, beyond
        cdef uint32_t own = <uint32_t>batch.partition
        cdef ms_view *view = &batch.view
        cdef const int32_t *keys = view.key_offsets
        cdef const int32_t *starts = view.value_offsets
        cdef const uint8_t *key
        cdef bint is_null, loading = strays is not None
        if keys == NULL:
            return
        beyond = min(batch.first + batch.count, ms_view_find_offset(view, end))
        for at in range(batch.first, beyond):
            if view.key_validity != NULL and not ms_bit(view.key_validity, at):
                continue
            key = view.keys + keys[at]
            size = <uint32_t>(keys[at + 1] - keys[at])
            is_null = view.value_validity != NULL and not ms_bit(view.value_validity, at)
            if partitions > 1 and ms_xxh3_64(key, size, 0) % partitions != own:
                self.stray(batch, at, is_null, strays)
            elif not is_null:
                self.put(key, size, view.values + starts[at],
                         <uint32_t>(starts[at + 1] - starts[at]), MS_LATEST_HOME)
            elif loading and partitions > 1:
                self.put(key, size, NULL, 0, MS_LATEST_GONE)
            else:
                ms_latest_remove(&self.c, key, size)

    cdef int stray(self, Batch batch, uint32_t at, bint is_null, dict strays) except -1:
        cdef ms_view *view = &batch.view
        cdef int64_t timestamp
        key = PyBytes_FromStringAndSize(<const char *>view.keys + view.key_offsets[at],
                                        view.key_offsets[at + 1] - view.key_offsets[at])
        value = None
        if not is_null:
            value = PyBytes_FromStringAndSize(<const char *>view.values + view.value_offsets[at],
                                              view.value_offsets[at + 1] - view.value_offsets[at])
        if strays is None:
            self.take_stray(key, value)
            return 0
        timestamp = view.timestamps[at] if view.timestamps != NULL else view.timestamp_min
        before = strays.get(key)
        if before is None or before[2] == batch.partition or before[0] <= timestamp:
            strays[key] = timestamp, value, batch.partition
        return 0

    cdef int take_stray(self, bytes key, bytes value) except -1:
        """What another partition says of a key counts where its own has said nothing."""
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(key)
        cdef uint32_t size = <uint32_t>PyBytes_GET_SIZE(key)
        cdef const ms_latest_record *found = ms_latest_find(&self.c, data, size)
        if found != NULL and found.origin != MS_LATEST_STRAY:
            return 0
        if value is None:
            ms_latest_remove(&self.c, data, size)
        else:
            self.put(data, size, <const uint8_t *>PyBytes_AS_STRING(value),
                     <uint32_t>PyBytes_GET_SIZE(value), MS_LATEST_STRAY)
        return 0

    def _end_era(self, dict strays not None, bint moved):
        """An era is loaded, and so are its `strays`. With `moved` another one follows."""
        for key, (_, value, _) in strays.items():
            self.take_stray(key, value)
        ms_latest_end_era(&self.c, moved)

    def _dump(self):
        """(ends of keys, ends of values, keys, values, origins) as bytes; ends are 64-bit."""
        key_ends = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(8 * self.c.count))
        value_ends = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(8 * self.c.count))
        keys = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>self.c.key_bytes)
        values = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>self.c.value_bytes)
        origins = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>self.c.count)
        cdef uint64_t *key_end = <uint64_t *><void *>PyBytes_AS_STRING(key_ends)
        cdef uint64_t *value_end = <uint64_t *><void *>PyBytes_AS_STRING(value_ends)
        cdef char *key_at = PyBytes_AS_STRING(keys)
        cdef char *value_at = PyBytes_AS_STRING(values)
        cdef char *origin = PyBytes_AS_STRING(origins)
        cdef const ms_latest_record *record
        cdef uint64_t i, row = 0, key_size = 0, value_size = 0
        for i in range(self.c.capacity):
            record = self.c.entries[i].record
            if record == NULL:
                continue
            memcpy(key_at + key_size, ms_latest_key(record), record.key_size)
            memcpy(value_at + value_size, ms_latest_value(record), record.value_size)
            key_size += record.key_size
            value_size += record.value_size
            key_end[row] = key_size
            value_end[row] = value_size
            origin[row] = <char>record.origin
            row += 1
        return key_ends, value_ends, keys, values, origins

    def _load(self, key_ends, value_ends, keys, values, origins):
        """Take over what `_dump` made; ValueError where it is not consistent."""
        cdef Py_buffer parts[5]
        cdef int held = 0
        try:
            for part in (key_ends, value_ends, keys, values, origins):
                PyObject_GetBuffer(part, &parts[held], PyBUF_SIMPLE)
                held += 1
            self.load(&parts[0], &parts[1], &parts[2], &parts[3], &parts[4])
        finally:
            while held:
                held -= 1
                PyBuffer_Release(&parts[held])

    cdef int load(self, const Py_buffer *key_ends, const Py_buffer *value_ends,
            const Py_buffer *keys, const Py_buffer *values, const Py_buffer *origins) except -1:
        cdef const uint8_t *key = <const uint8_t *>keys.buf
        cdef const uint8_t *value = <const uint8_t *>values.buf
        cdef const uint8_t *origin = <const uint8_t *>origins.buf
        cdef uint64_t i, key_end, value_end, key_at = 0, value_at = 0
        if not key_ends.len == value_ends.len == 8 * origins.len:
            raise ValueError("as many keys as values and origins")
        for i in range(<uint64_t>origins.len):
            # The parts of a file need not be aligned.
            memcpy(&key_end, <const char *>key_ends.buf + 8 * i, 8)
            memcpy(&value_end, <const char *>value_ends.buf + 8 * i, 8)
            if not (key_at <= key_end <= <uint64_t>keys.len
                    and value_at <= value_end <= <uint64_t>values.len
                    and key_end - key_at <= MS_KEY_BYTES_MAX
                    and value_end - value_at <= MS_VALUE_BYTES_MAX):
                raise ValueError("ends that fall")
            if origin[i] > MS_LATEST_STRAY:
                raise ValueError(f"an origin of {origin[i]}")
            self.put(key + key_at, <uint32_t>(key_end - key_at),
                     value + value_at, <uint32_t>(value_end - value_at),
                     <ms_latest_origin>origin[i])
            key_at = key_end
            value_at = value_end
        return 0


cdef object key_bytes(const ms_latest_record *record):
    return PyBytes_FromStringAndSize(<const char *>ms_latest_key(record), record.key_size)
