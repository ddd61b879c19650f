# ms_heartbeat.h: the renewal of the lease of one message
cdef extern from "ms_heartbeat.h" nogil:
    ctypedef struct ms_heartbeat_entry:
        pass
    ctypedef struct ms_heartbeat_state:
        uint64_t token
        cbool lost
        cbool over
    int ms_heartbeat_add(ms_heartbeat_entry *entry, void *word, uint64_t token, int64_t lease_ms,
                         int64_t limit_ns)
    void ms_heartbeat_remove(ms_heartbeat_entry *entry, ms_heartbeat_state *out_state)
    void ms_heartbeat_check(const ms_heartbeat_entry *entry, ms_heartbeat_state *out_state)
    ms_status ms_heartbeat_extend(ms_heartbeat_entry *entry, int64_t lease_ms)
    void ms_heartbeat_stop()
    uint32_t ms_heartbeat_count()


@cython.final
@cython.no_gc
cdef class KeepAlive:
    """A lease that is renewed until `stop`; made by `keep_alive`. Thread-safe.

    It keeps the message, and so the mapping that the lease's word lies in. Whatever ends the lease
    through the message stops it.
    """
    cdef ms_heartbeat_entry entry
    cdef Message message
    cdef bint running

    def __dealloc__(self):
        self.end()

    cdef void end(self) noexcept:
        cdef ms_heartbeat_state state
        if self.running:
            self.running = False
            ms_heartbeat_remove(&self.entry, &state)
            self.message.lease.word = state.token
            self.message.keeper = NULL

    def stop(self):
        """Renew no more. The message has the token of the last renewal, to ack with."""
        self.end()

    def _extend(self, int64_t lease_ms):
        """Renew now for so long, and go on so; the status."""
        return <int>ms_heartbeat_extend(&self.entry, lease_ms)

    @property
    def lost(self):
        """Did the lease end, or was it given to another?"""
        cdef ms_heartbeat_state state
        ms_heartbeat_check(&self.entry, &state)
        return state.lost

    @property
    def over(self):
        """Has the time limit passed, so that it is not renewed any more?"""
        cdef ms_heartbeat_state state
        ms_heartbeat_check(&self.entry, &state)
        return state.over


cdef bint _stops_at_exit = False
cdef str NO_THREAD = (
    "the thread that renews leases and sessions could not be started; raise the limit of "
    "processes (ulimit -u, pids.max) and call again")


def keep_alive(Message message, double lease, double time_limit):
    """Renew the lease of a message every third of `lease` seconds, for `time_limit` seconds.

    By a thread that needs no GIL.
    """
    cdef KeepAlive alive = KeepAlive.__new__(KeepAlive)
    cdef int error
    global _stops_at_exit
    if not _stops_at_exit:
        import atexit
        atexit.register(heartbeat_stop)
        _stops_at_exit = True
    message.queue.alive()
    message.claim()
    alive.message = message
    error = ms_heartbeat_add(
        &alive.entry, ms_queue_word(&message.queue.c, message.lease.slot), message.lease.word,
        <int64_t>(lease * 1e3), <int64_t>(time_limit * 1e9))
    if error:
        raise _errors.StorageError(error, NO_THREAD, message.queue.path)
    alive.running = True
    message.keeper = <PyObject *>alive
    return alive


def heartbeat_count():
    """How many leases this process renews."""
    return ms_heartbeat_count()


def heartbeat_stop():
    """End the thread that renews leases, and wait for its end; the next lease starts another."""
    with nogil:
        ms_heartbeat_stop()
