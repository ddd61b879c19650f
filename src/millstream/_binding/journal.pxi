# The page of the journal: the word under which transactions commit, and how far they are applied.

@cython.final
cdef class JournalPage:
    """The page as mapped; docs/format.md has its bytes."""
    cdef _ControlBuffer keep

    def __cinit__(self, memory):
        self.keep = hold_control(memory)

    cdef char *at(self, Py_ssize_t offset) noexcept:
        return <char *>self.keep.buffer.buf + offset

    cdef int changes(self) except -1:
        return must_write(not self.keep.buffer.readonly, "the journal's page")

    def word(self, members, str what, double timeout):
        """The journal's owner word; `with` it a transaction commits, or is applied."""
        return make_word(self.at(64), self, members, what, timeout)

    @property
    def applied(self):
        """Transactions before this offset of the journal are applied. Holder of the word sets it.
        """
        return ms_load64(<uint64_t *>self.at(72))

    def set_applied(self, uint64_t offset):
        self.changes()
        ms_store64(<uint64_t *>self.at(72), offset)

    @property
    def checkpoint(self):
        """What is before this offset needs no replay: a power cut takes nothing of it."""
        return ms_load64(<uint64_t *>self.at(80))

    def set_checkpoint(self, uint64_t offset):
        self.changes()
        ms_store64(<uint64_t *>self.at(80), offset)


cdef class TransactionCore:
    """The end of a `with` in C: a signal comes within it, where it is undone, and never before.

    Hooks of the subclass: ``_end(kind)``, ``_interrupted()``.
    """

    def __exit__(self, kind, error, trace):
        try:
            self._end(kind)
        except BaseException:
            self._interrupted()
            raise


def contents(values, str what):
    """(list of bytes and None, bytes in all) of what a caller gave, to be kept."""
    if type(values) is not list and type(values) is not dict:  # its keys, as of append_many
        check_many(values, what, "append")
    cdef list found = values if type(values) is list else list(values)
    cdef list kept = None
    cdef Py_ssize_t i, total = 0
    for i in range(len(found)):
        value = found[i]
        if type(value) is bytes:
            total += PyBytes_GET_SIZE(value)
        elif value is not None:
            if kept is None:
                kept = list(found)
            kept[i] = as_bytes(value, what)
            total += len(kept[i])
    if kept is None:
        kept = list(found) if found is values else found
    return kept, total
