# The hot methods of a stream: appending, choosing partitions, waiting. What is not hot, or needs
# the file system, is in log/handle.py, which these call through the hooks.

cdef enum:
    EVENT_WANT_SYNC = 1 << 8  # "interval" asked for on a handle of another level

EVENTS = {"written": MS_EVENT_WRITTEN, "rolled": MS_EVENT_ROLLED, "spare": MS_EVENT_SPARE,
          "prepare": MS_EVENT_PREPARE, "unsynced": MS_EVENT_UNSYNCED, "late": MS_EVENT_LATE,
          "want_sync": EVENT_WANT_SYNC}
LEVELS = {"process": 0, "interval": 1, "sync": 2}


cdef int64_t TIMESTAMP_MOST = <int64_t>1 << 62


cdef class StreamCore:
    """Base of `StreamHandle`: the control file as mapped, and appending.

    Hooks of the subclass: ``_open_partition(index)``, ``_resolve(index, status, owner, need_bytes,
    deadline)``,
    ``_after_append(log, events, end, level, timeout)``, ``_leave_to_background(log)``,
    ``_place(index, epoch, offset)``,
    ``_make_durable(index, end, timeout)``, ``_deadline(timeout)``, ``_timestamp(value)``,
    ``_timestamps(values, count)``, ``_refresh()``, ``_keep_up()``, ``_where(index)``,
    ``_where_producer(index)``.
    """
    cdef object map
    cdef Py_buffer control
    cdef bint mapped
    cdef bint writable
    cdef ms_control_header *header
    cdef list opened
    cdef uint32_t count
    cdef uint32_t round_robin
    cdef uint32_t fork
    cdef int level
    cdef public uint32_t _config_seen  # number of the configuration that was read last
    cdef bint is_closed
    cdef bint layered
    cdef list natives
    cdef object opening

    def __dealloc__(self):
        if self.mapped:
            PyBuffer_Release(&self.control)

    # --- what the subclass builds on --------------------------------------------------------------

    def _attach(self, control, bint writable, str durability, uint32_t turn):
        """Use this map of the control file; partitions that were open stay open."""
        cdef Py_buffer buffer
        PyObject_GetBuffer(control, &buffer, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        cdef Py_buffer before = self.control
        cdef bint was_mapped = self.mapped
        self.control = buffer
        self.header = <ms_control_header *>buffer.buf
        self.map = control
        self.mapped = True
        self.writable = writable
        if was_mapped:  # last: unmapping lets other threads run, which read the header
            PyBuffer_Release(&before)
        cdef uint32_t room = <uint32_t>(
            (buffer.len - MS_CONTROL_BLOCKS_AT) // sizeof(ms_control_block))
        self.count = min(ms_load32(&self.header.partitions), room)
        if self.opened is None:
            self.opened = []
            self.natives = []
            self.opening = Lock(f"{self.path}: opening a partition", self.session.members,
                                reentrant=True)
            self.round_robin = turn
        self.opened.extend([None] * (self.count - len(self.opened)))
        self.natives.extend([None] * (self.count - len(self.natives)))
        self.level = LEVELS[durability]
        self.fork = ms_fork_count()

    def _new_partition(self, uint32_t index, members, uint64_t generation,
                       int64_t clock_offset_us, private=None):
        cdef Partition partition = Partition.__new__(Partition)
        # The map that the block lies in stays alive as long as the partition: a later, larger map
        # of the same
        # file shares its pages.
        cdef _ControlBuffer keep = hold_control(self.map if private is None else private)
        partition.control = keep
        partition.writable = not keep.buffer.readonly
        partition.c.header = <ms_control_header *>keep.buffer.buf
        partition.c.block = index + <ms_control_block *>(
            <uint8_t *>keep.buffer.buf + MS_CONTROL_BLOCKS_AT)
        partition.c.generation = generation
        partition.c.late_us = UINT64_MAX
        partition.c.self = members.word
        partition.c.clock_offset_us = clock_offset_us
        partition.members = members
        partition.index = index
        partition.syncing = _Seat.__new__(_Seat)
        return partition

    def _partition(self, index):
        """The open partition, opening it when this is its first use here."""
        cdef uint32_t i
        self.alive()
        try:
            i = index_of("partition", index)
        except OverflowError:
            i = 0xffffffff  # negative, or larger than any
        if i >= self.count:
            self._refresh()
        if i >= self.count:
            raise _errors.NotFound(
                f"partition {index}: the stream has partitions 0 to {self.count - 1}")
        if self.opened[i] is None:
            with self.opening:
                if self.opened[i] is None:
                    log = self._open_partition(i)
                    if self.opened[i] is None:  # a handler may have come between
                        self.natives[i] = log.native
                        self.opened[i] = log
        return self.opened[i]

    def _figures(self):
        """Of each partition, in one pass, as `log.handle.Figures` names them; None: ask `_log`."""
        cdef list found = []
        cdef Partition native
        cdef ms_control_block *block
        cdef ms_mark mark
        cdef int64_t now = ms_clock_monotonic_ns(), since
        cdef uint32_t i
        self.alive()
        for i in range(self.count):
            native = <Partition>self.natives[i]
            if self.opened[i] is None or self.opened[i].private or \
                    ms_load64(&native.c.block.walked) != native.c.generation or \
                    ms_partition_try_end(native.c.block, &mark) != MS_OK:
                found.append(None)
                continue
            block = native.c.block
            since = <int64_t>ms_load64(&block.unsynced_at)
            if since > now or ms_load64(&block.durable) >= ms_load64(&block.tail):
                since = 0
            found.append((
                self.opened[i],
                (ms_load64(&block.first_segment), ms_load64(&block.active),
                 ms_load32(&block.structure), ms_load32(&block.compacted)),
                mark.position, ms_load64(&block.first_offset), mark.offset,
                ms_load64(&block.durable_offset), ms_load32(&block.poison),
                since > 0 and now - since > <int64_t>LATE_NS))
        return found

    def _opened(self):
        return [log for log in self.opened or () if log is not None]

    def _close(self):
        self.is_closed = True
        if self.opened is not None:
            self.opened[:] = [None] * len(self.opened)
            self.natives[:] = [None] * len(self.natives)
        if self.mapped:
            self._wake()  # readers that follow here end now
            self.keep_header()

    cdef int keep_header(self) except -1:
        """Give the map up, and with it a descriptor: a closed handle may live on. What it still
        reads is a copy of the header."""
        cdef Py_buffer buffer
        copy = private_copy(PyBytes_FromStringAndSize(
            <const char *>self.control.buf, MS_CONTROL_BLOCKS_AT))
        PyObject_GetBuffer(copy, &buffer, PyBUF_SIMPLE)
        cdef Py_buffer before = self.control
        self.control = buffer
        self.header = <ms_control_header *>buffer.buf
        self.map = copy
        PyBuffer_Release(&before)  # last, as in _attach
        return 0

    def _set_layered(self, bint layered):
        """Can what is mapped be left behind, on a lower layer?"""
        self.layered = layered

    def _set_level(self, str durability):
        self.level = LEVELS[durability]

    cdef int alive(self) except -1:
        if self.is_closed:
            self._check_live()  # which says why
            raise _errors.Closed("the stream is closed; open the store again")
        if self.fork != ms_fork_count():
            raise _errors.Closed(
                "the stream was inherited through a fork; open the store again in the child")
        if ms_load32(&self.header.config) != self._config_seen:
            self._keep_up()
        return 0

    @property
    def closed(self):
        """Is the handle closed?"""
        return self.is_closed or self.fork != ms_fork_count()

    @property
    def partitions(self):
        """How many partitions the stream has."""
        if self.layered and not self.is_closed:  # the header may be one that nobody writes to
            self._check_live()
        if not self.is_closed and ms_load32(&self.header.partitions) != self.count:
            self._refresh()
        return self.count

    @property
    def _state(self):
        return ms_load32(&self.header.state)

    @property
    def _config_number(self):
        return ms_load32(&self.header.config)

    cdef int changes(self) except -1:
        """Called before each store into the control file: in a read-only map it would kill us."""
        if not self.writable:
            self.session.check_writable()
        return 0

    def _set_state(self, uint32_t state):
        self.changes()
        ms_store32(&self.header.state, state)
        ms_add32(&self.header.wake, 1)
        ms_futex_wake(&self.header.wake, 0x7fffffff)

    def _begin_config(self):
        """The configuration is being changed: its number is even. Holder of maintenance."""
        self.changes()
        cdef uint32_t number = ms_load32(&self.header.config)
        ms_store32(&self.header.config, (number + 2) & ~<uint32_t>1)

    def _end_config(self):
        """It is changed: its number is odd."""
        self.changes()
        ms_store32(&self.header.config, ms_load32(&self.header.config) | 1)

    def _set_partitions(self, uint32_t count):
        self.changes()
        ms_store32(&self.header.partitions, count)

    def _wake(self):
        """Wake all who wait. A reader has no waiters to wake: each checks by itself."""
        if not self.writable:
            return
        ms_add32(&self.header.wake, 1)
        ms_futex_wake(&self.header.wake, 0x7fffffff)

    def _prepare_wait(self):
        """Say that somebody will sleep; check for records after this and before `_wait`."""
        cdef uint32_t seen = ms_load32(&self.header.wake)
        if self.writable:
            ms_store32(&self.header.waiters, 1)
            ms_fence()
        return seen

    def _wait(self, uint32_t seen, double timeout):
        """Sleep until somebody appends, at most `timeout` seconds, maybe less."""
        # A read-only map cannot say that somebody waits, so nobody wakes it: it checks 100 times a
        # second.
        cdef double slice = 1.0 if self.writable else 0.01
        cdef int64_t left = <int64_t>((timeout if timeout < slice else slice) * 1e9)
        room = room_of_greenlets()
        if room is not None:
            room(self._wait_here, (seen, left))
        else:
            self._wait_here(seen, left)
            PyErr_CheckSignals()

    def _wait_here(self, uint32_t seen, int64_t left):
        if self.is_closed:
            return
        cdef ms_control_header *header = self.header
        # Another thread may close the stream meanwhile, and give the map up.
        cdef _ControlBuffer keep = hold_control(self.map)
        with nogil:
            ms_futex_wait(&header.wake, seen, left)

    def partition_for(self, key):
        """The partition of a key: ``xxh3_64(key) % partitions``, for ever.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     store.stream("s", partitions=8).partition_for(b"N14228")
        6
        """
        if not PyObject_CheckBuffer(key):
            raise _errors.InvalidType(f"key: expected bytes-like, found {type(key).__name__}")
        cdef uint64_t count = self.partitions
        try:
            return xxh3_64(key) % count
        except (BufferError, ValueError) as error:
            raise _errors.InvalidType(f"key: not contiguous bytes: {error}") from error

    # --- one record ------------------------------------------------------------------------------

    def get(self, partition, offset=None):
        """One record, by its partition and offset, or by its `Position`.

        Takes no lock and copies nothing until its value, key or headers are asked for. A batch is
        checked the first time that this process reads of it.

        Args:
            partition: a partition, or a `Position`: then the record must be of its epoch.
            offset: offset of the record in the partition; not with a `Position`.

        Raises: OffsetOutOfRange where no such record is there yet, or any more; NotFound for one
        that compaction removed; CorruptBatch, InvalidArgument, InvalidType, Closed.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("s", partitions=2)
        ...     position = stream.append(b"hello", key=b"k")
        ...     stream.get(position).value, stream.get(position.partition, 0).key
        (b'hello', b'k')
        """
        cdef Record record = Record.__new__(Record)
        cdef uint64_t epoch = UINT64_MAX, position, wanted
        cdef bint of_epoch = type(partition) is Position
        cdef Partition native
        if of_epoch:
            if offset is not None:
                raise _errors.InvalidArgument(
                    f"offset {offset!r}: {partition!r} says already where the record is")
            epoch = (<Position>partition).epoch
            offset = (<Position>partition).offset
            partition = (<Position>partition).partition
        elif offset is None:
            raise _errors.InvalidType(
                f"partition {partition!r}: expected a Position, or a partition and an offset")
        native = self.native_to_read(partition)
        wanted = offset_of(offset)
        if wanted == UINT64_MAX or (of_epoch and epoch == UINT64_MAX):
            # What the words below cannot say: it raises, and names what was given.
            self._place(native.index, epoch if of_epoch else None, index_of("offset", offset))
        record.owner = self.find(native, wanted, epoch, &position, &record.view, &record.row)
        record.partition = <int32_t>native.index
        record.epoch = (<Segment>record.owner).c.epoch
        return record

    def get_many(self, partition, offsets):
        """Records of one partition as one `Batch`, in the order of their offsets here.

        They are copied into one piece of memory. Offsets that follow one another cost least.
        `epoch` of the batch is that of its last record.

        Args:
            partition: one partition.
            offsets: a list or NumPy array of them, at least one, in any order.

        Raises: as `get`; LimitExceeded where they are more than 2 GiB, or 2**31 records.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("s")
        ...     _ = stream.append_many([b"a", b"b", b"c"])
        ...     list(stream.get_many(0, [2, 0]).values)
        [b'c', b'a']
        """
        cdef Partition native = self.native_to_read(partition)
        cdef _Runs runs = _Runs.__new__(_Runs)
        cdef ms_view view
        cdef uint64_t position, wanted
        cdef uint32_t row
        for offset in each_offset(offsets):
            wanted = offset_of(offset)
            if wanted == UINT64_MAX:
                self._place(native.index, None, index_of("offset", offset))  # raises
            if not runs.goes_on(wanted):
                segment = self.find(native, wanted, UINT64_MAX, &position, &view, &row)
                runs.add(segment, position, &view, row)
        if runs.count == 0:
            raise _errors.InvalidArgument("offsets: none, and a batch has at least one record")
        return runs.gathered(native)

    cdef Partition native_to_read(self, object partition):
        cdef int overflow = 0
        cdef long long index = -1
        self.alive()
        if ms_load32(&self.header.state) != 1:
            self._check_live()  # raises
        if type(partition) is int:
            index = PyLong_AsLongLongAndOverflow(partition, &overflow)
        if 0 <= index < self.count and self.natives[index] is not None:
            return <Partition>self.natives[index]
        return self._partition(partition).native

    cdef Segment find(self, Partition native, uint64_t offset, uint64_t epoch,
                      uint64_t *position, ms_view *view, uint32_t *row):
        """The segment that has a record, with its batch and where it is in that."""
        cdef ms_error err
        cdef ms_status status
        cdef uint64_t limit = 0
        cdef bint asked = False
        cdef Segment segment = native.placed_for(offset, &limit)
        while True:
            if segment is None or (epoch != UINT64_MAX and segment.c.epoch != epoch):
                # Finds it, or raises; what it found is placed for the next.
                segment, limit = self._place(
                    native.index, None if epoch == UINT64_MAX else epoch, offset)
                asked = True
            status = ms_segment_seek(&segment.c, offset, segment.within(0, limit), position, view,
                                     &err)
            if status < 0:
                fail(status, &err, segment.path)
            if status == MS_OK or asked:
                break
            segment = None  # the log goes on in another, or ends here
        if status == MS_OK:
            row[0] = ms_view_find_offset(view, offset)
            if offset == (<uint64_t>view.offsets[row[0]] if view.offsets != NULL
                          else view.base_offset + row[0]):
                return segment
        raise _errors.NotFound(
            f"{self._where(native.index)}: offset {offset}: compaction removed this record")

    # --- appending
    # -----------------------------------------------------------------------------------

    cdef int level_of(self, object durability) except -1:
        if durability is None:
            return self.level
        level = LEVELS.get(durability) if isinstance(durability, str) else None
        if level is None:
            raise _errors.InvalidArgument(
                f"durability {durability!r}: expected one of {', '.join(LEVELS)}")
        return level

    cdef int publish(self, uint32_t index, const ms_records *records, const ms_shape *shape,
            int level,
                     object timeout, ms_appended *out, uint32_t producer=0,
                     uint64_t sequence=0) except -1:
        """1: it was a re-send, at least in part, and nothing was appended."""
        cdef ms_error err
        cdef ms_status status
        cdef Partition partition
        cdef object deadline = None
        cdef uint32_t events = 0
        if not self.writable:
            self.session.check_writable()  # raises: the map of the control file is read-only
        if timeout is not None:
            self._deadline(timeout)  # checked also where nothing is waited for
        while True:
            if self.natives[index] is None:  # also when another thread closed the store meanwhile
                self._partition(index)
            partition = <Partition>self.natives[index]
            if level == 2 and shape.value_bytes >= MS_CLEAR_LEAST:
                partition.clear_for(shape)
            if level == 2 and not partition.can_sync():
                self._partition(index).prepare_sync()  # raises before anything is stored
            status = ms_partition_try_append(
                &partition.c, records, shape, producer, sequence, out, &err)
            events |= out.events
            if status == MS_OK:
                break
            if status == MS_RESENT:
                out.end = ms_load64(&partition.c.block.tail)  # the first copy is before it
                break
            partition.follow()
            if deadline is None:
                deadline = self._deadline(timeout)
            if status < 0:
                fail(status, &err, self._where(index))
            self._resolve(index, status, out.owner, out.need_bytes, deadline)
        if level == 1 and self.level != 1:
            events |= EVENT_WANT_SYNC
        if events or level == 2:
            self.stored(partition, records.count if status == MS_OK else 0, out, events, level,
                        timeout)
        return status == MS_RESENT

    cdef int stored(self, Partition partition, uint32_t count, const ms_appended *appended,
                    uint32_t events, int level, object timeout) except -1:
        """What an append does once its batch is there: an error of ours says `Indeterminate`."""
        cdef uint64_t end = appended.end
        log = self.opened[partition.index]
        try:
            if log is None and level:
                raise _errors.Closed(f"{self._where(partition.index)}: closed by another thread")
            if events and log is not None:
                partition.follow()
                self._after_append(log, events, end, level, timeout)
            if level == 2:
                self.make_durable(partition, end, timeout)
        except BaseException as error:
            self.leave_to_background(partition.index)
            if _errors.is_ours(error) and (
                    level == 0 or ms_load64(&partition.c.block.durable) >= end):
                return 0  # as durable as was asked for: whoever closed the store synced it, say
            raise _errors.indeterminate(
                error, "the record is stored, but whether it survives a power cut is not known",
                self._where(partition.index),
                (Span(partition.index, appended.epoch, appended.first_offset, count),)
                if count else ())
        return 0

    cdef int make_durable(self, Partition partition, uint64_t end, object timeout) except -1:
        """Group commit. Where the sync of another covers this record, no Python runs here."""
        cdef cbool lead = False
        log = self.opened[partition.index]  # before: another thread may close the store meanwhile
        if timeout is None and log is not None:
            work = log._sync_owned
            if partition.await_durable(end, &lead) == MS_OK:
                return 0
            if lead:
                partition.led(work, False)
                if ms_load64(&partition.c.block.durable) >= end:
                    return 0
        self._make_durable(partition.index, end, timeout)
        return 0

    cdef int64_t microseconds(self, object timestamp) except? -1:
        cdef int64_t value
        if type(timestamp) is int and -TIMESTAMP_MOST <= timestamp <= TIMESTAMP_MOST:
            value = timestamp
            return value
        return self._timestamp(timestamp)

    cdef uint32_t next_turn(self):
        cdef uint32_t index = self.round_robin % self.count
        self.round_robin += 1
        return index

    def append(self, value, *, key=None, headers=None, timestamp=None, partition=None,
            durability=None,
               timeout=None):
        """Append one record and return its `Position`.

        Durability: at `process` and `interval` the record survives the death of any process when
        this returns; at
        `interval` also a power cut after the next completed sync (one starts every 100 ms); at
        `sync` it survives a
        power cut when this returns.

        Args:
            value: bytes-like, at most 256 MiB; None is a null (with a key: a tombstone).
            key: bytes-like, at most 64 KiB: chooses the partition, and so keeps records of one key
            in order.
            headers: mapping of str to bytes.
            timestamp: int of microseconds since 1970 UTC, datetime or numpy.datetime64; default:
            now.
            partition: chooses the partition by hand. Without key and partition, calls go round the
            partitions.
            durability: another level than the stream's, for this call.
            timeout: seconds to wait for other processes; default 30.

        Raises: StoreFull, StorageError, LockTimeout, LimitExceeded, InvalidType, InvalidArgument;
        Indeterminate when
        the sync behind the record failed.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     store.stream("s").append(b"hello", key=b"k")
        Position(partition=0, epoch=1, offset=0)
        """
        cdef ms_slice value_slice, key_slice
        cdef ms_records records
        cdef ms_shape shape
        cdef ms_appended out
        cdef ms_error err
        cdef ms_status status
        cdef uint32_t index
        cdef Position position
        cdef int level
        self.alive()
        if (type(value) is not bytes and value is not None) or headers is not None or \
                (type(key) is not bytes and key is not None):
            span = self.append_many([value], keys=None if key is None else [key],
                                    headers=None if headers is None else [headers],
                                    timestamps=None if timestamp is None
                                    else self.microseconds(timestamp),
                                    partition=partition, durability=durability, timeout=timeout)[0]
            return Position(span.partition, span.epoch, span.first_offset)
        memset(&records, 0, sizeof(ms_records))
        records.count = 1
        records.values = &value_slice
        if value is None:
            value_slice.data = NULL
            value_slice.size = -1
        else:
            value_slice.data = <const uint8_t *>PyBytes_AS_STRING(value)
            value_slice.size = PyBytes_GET_SIZE(value)
        if timestamp is None:
            records.timestamp = records.called_us = ms_clock_wall_us()
        else:
            records.timestamp = self.microseconds(timestamp)
            records.called_us = ms_clock_coarse_us()
        if ms_load32(&self.header.partitions) != self.count:
            self._refresh()
        if key is not None:
            key_slice.data = <const uint8_t *>PyBytes_AS_STRING(key)
            key_slice.size = PyBytes_GET_SIZE(key)
            records.keys = &key_slice
            index = 0
            if partition is None and self.count > 1:
                index = <uint32_t>(ms_xxh3_64(key_slice.data, <size_t>key_slice.size,
                    0) % self.count)
        elif partition is None:
            index = self.next_turn()
        if partition is not None:
            index = self._partition(partition).native.index
        level = self.level if durability is None else self.level_of(durability)
        status = ms_batch_measure(&records, &shape, &err)
        if status < 0:
            fail(status, &err, None)
        position = Position.__new__(Position)  # before: nothing fails behind the publishing
        self.publish(index, &records, &shape, level, timeout, &out)
        position.partition = index
        position.epoch = out.epoch
        position.offset = out.first_offset
        return position

    def append_many(self, values, *, keys=None, headers=None, timestamps=None, partition=None,
            durability=None,
                    timeout=None):
        """Append records, and return a `Span` for each partition that got some.

        With keys, each goes to the partition of its key (records without a key go together to the
        next one in
        turn); without, the batch stays whole. Readers see a partition's share whole or not at all.
        One bad element
        and nothing is appended. Durability as for `append`.

        Args:
            values: list of bytes-like or None; NumPy array (one fixed-width or structured element
            a value); Arrow
                array (binary, string, fixed-size or primitive).
            keys: likewise, as many; a NumPy array of dtype 'S' without its padding.
            headers: a mapping for all records, or a sequence of mapping or None, one a record.
            timestamps: one for all (see `append`), or a list, NumPy or Arrow array of them.
            partition, durability, timeout: see `append`.

        Raises: as `append`. Where a share fails behind others, `appended` of the error has the
        spans of those, each as durable as was asked for; what is stored and may not be is in
        `published` of an `Indeterminate`. Ctrl-C between shares leaves those that are there, which
        the background syncs.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     store.stream("s").append_many([b"a", b"b", None], keys=[b"1", b"2", b"1"])
        [Span(partition=0, epoch=1, first_offset=0, count=3)]
        """
        self.alive()
        cdef SliceColumn value_column = column_of(values, "value")
        cdef SliceColumn key_column = None if keys is None else column_of(keys, "key", True)
        cdef HeaderColumn header_column = None
        cdef Py_ssize_t count = value_column.count
        if key_column is not None and key_column.count != count:
            raise _errors.InvalidArgument(f"{key_column.count} keys for {count} values")
        if headers is not None:
            header_column = headers_of(headers, count)
        return self.append_columns(
            value_column.slices, NULL if key_column is None else key_column.slices, count,
            header_column,
            timestamps, partition, self.level_of(durability), timeout)

    def _append_share(self, uint32_t index, uint32_t producer, uint64_t sequence, values, keys,
                      headers, timestamps, bint synced):
        """What a transaction appends to one partition, as one batch; once for each sequence.

        Its `Span`, or None: it is there already. Where the journal is synced, nothing waits for a
        sync of this one; the background does it, for those who read only what is durable.
        """
        self.alive()
        cdef SliceColumn value_column = column_of(values, "value")
        cdef SliceColumn key_column = None if keys is None else column_of(keys, "key", True)
        cdef HeaderColumn header_column = None
        cdef Py_ssize_t count = value_column.count
        cdef ms_records records
        cdef ms_shape shape
        cdef ms_error err
        cdef ms_appended out
        cdef ms_status status
        cdef Py_buffer times
        cdef bint has_times = False
        memset(&records, 0, sizeof(ms_records))
        records.count = <uint32_t>count
        records.values = value_column.slices
        if key_column is not None:
            records.keys = key_column.slices
        if headers is not None:
            header_column = headers_of(headers, count)
            records.header_starts = header_column.starts
            records.header_names = header_column.names.slices
            records.header_values = header_column.values.slices
        records.first_sequence = sequence
        records.called_us = ms_clock_wall_us()
        if type(timestamps) is int:  # as the journal has it
            records.timestamp = timestamps
        else:
            PyObject_GetBuffer(self._timestamps(timestamps, count), &times, PyBUF_SIMPLE)
            has_times = True
            records.timestamps = <const int64_t *>times.buf
        try:
            if ms_load32(&self.header.partitions) != self.count:
                self._refresh()
            index = self._partition(index).native.index
            status = ms_batch_measure(&records, &shape, &err)
            if status < 0:
                fail(status, &err, None)
            if self.publish(index, &records, &shape, 1 if synced else min(self.level, 1), None,
                            &out, producer, sequence):
                return None
            return Span(index, out.epoch, out.first_offset, records.count)
        finally:
            if has_times:
                PyBuffer_Release(&times)

    def _partitions_of(self, list keys):
        """The partition of each key, None for one without."""
        cdef list found = []
        for key in keys:
            found.append(None if key is None else ms_xxh3_64(
                PyBytes_AS_STRING(key), <size_t>PyBytes_GET_SIZE(key), 0) % self.count)
        return found

    def _turn_of(self):
        """The partition whose turn it is, as for records without a key."""
        return self.next_turn()

    cdef list append_columns(self, ms_slice *values, ms_slice *keys, Py_ssize_t count,
            HeaderColumn headers,
                             object timestamps, object partition, int level, object timeout):
        cdef ms_records records
        cdef Py_buffer times
        cdef bint has_times = False
        if count == 0:
            return []
        if count > 0x7fffffff:
            raise _errors.LimitExceeded(f"{count} records in one call, the limit is {0x7fffffff}")
        memset(&records, 0, sizeof(ms_records))
        records.count = <uint32_t>count
        records.values = values
        records.keys = keys
        if headers is not None:
            records.header_starts = headers.starts
            records.header_names = headers.names.slices
            records.header_values = headers.values.slices
        records.called_us = ms_clock_wall_us()
        if timestamps is None:
            records.timestamp = records.called_us
        else:
            made = self._timestamps(timestamps, count)
            if type(made) is int:
                records.timestamp = made
            else:
                PyObject_GetBuffer(made, &times, PyBUF_SIMPLE)
                has_times = True
                records.timestamps = <const int64_t *>times.buf
        try:
            if ms_load32(&self.header.partitions) != self.count:
                self._refresh()
            if partition is not None:
                return self.append_whole(&records, self._partition(partition).native.index, level,
                    timeout)
            if keys == NULL:
                return self.append_whole(&records, self.next_turn(), level, timeout)
            if self.count == 1:
                return self.append_whole(&records, 0, level, timeout)
            return self.append_split(&records, level, timeout)
        finally:
            if has_times:
                PyBuffer_Release(&times)

    cdef list append_whole(self, ms_records *records, uint32_t index, int level, object timeout):
        cdef ms_shape shape
        cdef ms_error err
        cdef ms_appended out
        cdef ms_status status = ms_batch_measure(records, &shape, &err)
        if status < 0:
            fail(status, &err, None)
        cdef Span span = Span.__new__(Span)
        cdef list spans = [span]
        self.publish(index, records, &shape, level, timeout, &out)
        place_span(span, index, &out, records.count)
        return spans

    cdef list append_split(self, ms_records *records, int level, object timeout):
        """Rows to partitions by counting sort, everything measured before anything is appended."""
        cdef uint32_t parts = self.count, total = records.count, i, p, null_part = parts
        cdef uint32_t *chosen = NULL
        cdef uint32_t *rows = NULL
        cdef uint32_t *ends = NULL
        cdef ms_shape *shapes = NULL
        cdef ms_error err
        cdef ms_appended out
        cdef ms_status status
        cdef list shares = [], spans = []
        cdef _Share share
        try:
            chosen = <uint32_t *>PyMem_Malloc(total * sizeof(uint32_t))
            rows = <uint32_t *>PyMem_Malloc(total * sizeof(uint32_t))
            ends = <uint32_t *>PyMem_Calloc(parts + 1, sizeof(uint32_t))
            shapes = <ms_shape *>PyMem_Calloc(parts, sizeof(ms_shape))
            if chosen == NULL or rows == NULL or ends == NULL or shapes == NULL:
                raise MemoryError
            for i in range(total):
                if records.keys[i].size < 0:
                    if null_part == parts:
                        null_part = self.next_turn()
                    p = null_part
                else:
                    p = <uint32_t>(ms_xxh3_64(records.keys[i].data, <size_t>records.keys[i].size,
                        0) % parts)
                chosen[i] = p
                ends[p + 1] += 1
            for p in range(parts):
                ends[p + 1] += ends[p]
            for i in range(total):
                rows[ends[chosen[i]]] = i
                ends[chosen[i]] += 1
            # Now ends[p] is the end of p's rows, and the beginning of p + 1's.
            for p in range(parts):
                self.choose(records, rows, ends, p)
                if records.count:
                    status = ms_batch_measure(records, &shapes[p], &err)
                    if status < 0:
                        fail(status, &err, None)
            # Whatever can fail is done before the first share is stored.
            for p in range(parts):
                self.choose(records, rows, ends, p)
                if records.count:
                    self.make_ready(p, level)
            for p in range(parts):
                self.choose(records, rows, ends, p)
                if records.count:
                    # At "sync" wait when all are stored, so that they share their syncs.
                    share = share_in(shares, spans)
                    self.publish(p, records, &shapes[p], 0 if level == 2 else level, timeout, &out)
                    share.store(p, &out, records.count)
            if level == 2:
                self.make_all_durable(shares, timeout)
            return spans
        except BaseException as error:
            raise self.account_for(error, shares, level, timeout)
        finally:
            PyMem_Free(chosen)
            PyMem_Free(rows)
            PyMem_Free(ends)
            PyMem_Free(shapes)

    cdef int make_ready(self, uint32_t index, int level) except -1:
        """Open a partition, and have what its sync will need."""
        if self.natives[index] is None:
            self._partition(index)
        if level == 2 and not (<Partition>self.natives[index]).can_sync():
            self._partition(index).prepare_sync()
        return 0

    cdef int make_all_durable(self, list shares, object timeout) except -1:
        """Return when all these are durable; where one fails, the others are synced as well."""
        cdef _Share share
        failed = None
        for share in shares:
            try:
                self._make_durable(share.span.partition, share.end, timeout)
            except _errors.MillstreamError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return 0

    cdef object account_for(self, object error, list shares, int level, object timeout):
        """What to raise where some of the shares were stored before an error.

        Its `appended` has those that are as durable as was asked for. The others are in
        `published` of an `Indeterminate`, and left to the background.
        """
        cdef list durable = [], uncertain = []
        cdef _Share share
        cdef bint waits = _errors.is_ours(error)  # else a signal raised it, and must not wait
        shares = [share for share in shares if share.is_stored]
        if level == 2:
            for share in shares:
                self.leave_to_background(share.span.partition)
        for share in shares:
            if level == 2 and not self.is_durable(share.span.partition, share.end):
                try:
                    if waits:
                        self._make_durable(share.span.partition, share.end, timeout)
                except Exception as failed:
                    if not _errors.is_ours(failed):
                        raise
                if not self.is_durable(share.span.partition, share.end):
                    uncertain.append(share.span)
                    continue
            durable.append(share.span)
        if uncertain or (shares and not isinstance(error, _errors.MillstreamError)):
            error = _errors.indeterminate(
                error, f"{len(shares)} shares are stored, of which {len(uncertain)} may not survive"
                " a power cut", self.path, tuple(uncertain))
        if isinstance(error, _errors.MillstreamError):
            error.appended = tuple(durable)
        return error

    cdef int leave_to_background(self, uint32_t index) except -1:
        """A call ends before what it stored is synced: the background syncs it."""
        log = self.opened[index]
        if log is not None:
            (<Partition>log.native).c.written = False  # so that the next append reports again
            self._leave_to_background(log)
        return 0

    cdef bint is_durable(self, uint32_t index, uint64_t end) noexcept:
        native = self.natives[index]
        return native is not None and \
            ms_load64(&(<Partition>native).c.block.durable) >= end

    cdef int choose(self, ms_records *records, uint32_t *rows, uint32_t *ends,
            uint32_t p) except -1:
        cdef uint32_t begin = ends[p - 1] if p else 0
        records.rows = rows + begin
        records.count = ends[p] - begin
        return 0

    def append_arrow(self, data, *, value="value", key=None, timestamp=None, partition=None,
            durability=None,
                     timeout=None):
        """Append Arrow data: anything with ``__arrow_c_stream__`` or ``__arrow_c_array__``.

        Each chunk of the data is appended as it comes, as one batch a partition (several, where it
        is large); no
        Python object is made for a row. Where a later chunk fails, `appended` of the error has the
        spans before it.

        Args:
            data: a table, record batch, data frame or reader (pyarrow, polars, DuckDB, ...).
            value, key, timestamp: names of its columns; a key or timestamp of None: there is none.
            partition, durability, timeout: see `append`.

        Returns: a `Span` for each batch. Raises: as `append_many`; InvalidArgument for a column
        that is not there.
        """
        cdef ArrowChunk chunk
        cdef list spans = []
        made = ()
        cdef int level = self.level_of(durability)
        self.alive()
        for name in (value, key, timestamp):
            if name is not None and not isinstance(name, str):
                raise _errors.InvalidType(f"column {name!r}: expected a name, or None")
        cdef Py_ssize_t first, count
        try:
            for chunk in import_arrow(data, value, key, timestamp):
                first = 0
                while first < <Py_ssize_t>chunk.count:
                    count = rows_within(chunk, first)
                    times = None
                    if chunk.timestamps != NULL:
                        times = memory(chunk, chunk.timestamps + first, count * 8)
                    made = self.append_columns(
                        chunk.values + first, NULL if chunk.keys == NULL else chunk.keys + first,
                        count, None, times,
                        partition, level, timeout)
                    spans += made
                    made = ()
                    first += count
        except _errors.MillstreamError as error:
            error.appended = tuple(spans) + tuple(getattr(error, "appended", ()))
            raise
        except MemoryError as error:
            appended = (*spans, *made)  # the last are stored, and no memory was left to list them
            if not appended:
                raise
            failed = _errors.indeterminate(
                error, f"{len(appended)} batches are stored, what came next is not", self.path)
            failed.appended = appended
            raise failed
        return spans


cdef inline void place_span(Span span, uint32_t partition, const ms_appended *out,
                            uint32_t count) noexcept:
    span.partition = partition
    span.epoch = out.epoch
    span.first_offset = out.first_offset
    span.count = count


@cython.final
cdef class _Share:
    """One partition's part of a call: made before anything is stored, as nothing may fail later."""
    cdef Span span
    cdef uint64_t end
    cdef bint is_stored

    cdef int store(self, uint32_t partition, const ms_appended *out, uint32_t count) noexcept:
        place_span(self.span, partition, out, count)
        self.end = out.end
        self.is_stored = True
        return 0


cdef _Share share_in(list shares, list spans):
    cdef _Share share = _Share.__new__(_Share)
    share.span = Span.__new__(Span)
    shares.append(share)
    spans.append(share.span)
    return share


cdef enum:
    ARROW_BATCH_BYTES = 64 << 20


cdef Py_ssize_t rows_within(ArrowChunk chunk, Py_ssize_t first):
    """How many rows from `first` make a batch of about ARROW_BATCH_BYTES; at least one."""
    cdef Py_ssize_t i = first
    cdef int64_t size = 0
    while i < <Py_ssize_t>chunk.count and (i == first or size < ARROW_BATCH_BYTES):
        size += 16
        if chunk.values[i].size > 0:
            size += chunk.values[i].size
        if chunk.keys != NULL and chunk.keys[i].size > 0:
            size += chunk.keys[i].size
        i += 1
    return i - first


@cython.final
cdef class _ControlBuffer:
    cdef Py_buffer buffer

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)


cdef _ControlBuffer hold_control(object map):
    cdef _ControlBuffer keep = _ControlBuffer.__new__(_ControlBuffer)
    PyObject_GetBuffer(map, &keep.buffer, PyBUF_SIMPLE)
    return keep


cdef int must_write(bint writable, object where) except -1:
    """Called before a store into a map: in a read-only one it would kill the process."""
    if not writable:
        raise _errors.Unsupported(f"{where}: the store was opened read-only (mode='r')")
    return 0
