"""Error paths that no test executes, by reason: `path:function:text of the line`, each a pattern.

`tests/reached.py` says what an error path is, and fails where an entry has become untrue.
"""

UNREACHED: dict[str, list[str]] = {
    "A thread, a descriptor, memory or the disk is refused just there.": [
        "src/millstream/compat/__init__.py:_finish:self._tasks.end()",
        "src/millstream/compat/__init__.py:_finish:raise",
        "src/millstream/queues/backup.py:__init__:self.close()",
        "src/millstream/queues/backup.py:__init__:raise",
        "src/millstream/queues/loops.py:_step:for message in messages:",
        "src/millstream/queues/loops.py:_step:with contextlib.suppress(MillstreamError):",
        "src/millstream/queues/loops.py:_step:message.release()",
        "src/millstream/queues/loops.py:_step:raise",
        'src/millstream/queues/loops.py:run:LOG.exception("%s: %s", self.queue.name, type(err*',
        "src/millstream/queues/loops.py:run:self.stopping.wait(TROUBLE_SECONDS)",
        'src/millstream/store/background.py:_start_compactor:self._complain("its thread for c*',
        "src/millstream/store/background.py:_start_compactor:self._wanted.ring()",
        "src/millstream/store/background.py:_start_compactor:self.runs()",
        'src/millstream/store/background.py:watch_journal:say(f"{self.store!r}: the journal i*',
        "src/millstream/store/background.py:watch_journal:return",
        "src/millstream/log/handle.py:__init__:self._directory.close()",
        "src/millstream/log/handle.py:__init__:raise",
        "src/millstream/groups/group.py:_sync_in_background:self._give_back_changed()",
        "src/millstream/groups/group.py:_sync_in_background:raise",
        'src/millstream/store/background.py:_retain:say(f"{stream!r}: {error}", warn=False)*',
        'src/millstream/store/background.py:_note_time:say(f"{self.store!r}: noting the time:*',
        'src/millstream/store/background.py:_apply_waiting:say(f"{store!r}: {error}", warn=Fa*',
        'src/millstream/disk/clock.py:_boot:return ""',
    ],
    "An exception that is no error of ours: a fault of the program, which is not to be hidden.": [
        "src/millstream/store/background.py:sync_everything:raise",
        "src/millstream/store/transactions.py:apply:raise",
    ],
    "The only caller has checked it before: a second line of defence.": [
        'src/millstream/queues/settings.py:check:raise InvalidType(f"{name!r} is no option of*',
        "src/millstream/inspect/mending.py:span:return None",
    ],
    "A file that is listed before and after, and not found by its name: no file system does it.": [
        "src/millstream/log/compacted.py:extent:raise",
        "src/millstream/log/compaction.py:sealed:raise",
        "src/millstream/log/compaction.py:_up_to:raise",
        "src/millstream/log/compaction.py:run:raise",
        "src/millstream/log/compaction.py:_segment:raise",
        "src/millstream/log/reader.py:offset_at:raise",
        "src/millstream/log/reader.py:epoch_end:raise",
        "src/millstream/log/reader.py:_go_to:raise",
        "src/millstream/log/segments.py:_last_at_or_before:raise",
        "src/millstream/log/segments.py:between:raise",
    ],
    "Ctrl-C has to come within some instructions.": [
        "src/millstream/cli/records.py:note:raise KeyboardInterrupt",
        "src/millstream/queues/worker.py:start:self._end()",
        "src/millstream/queues/worker.py:start:raise",
    ],
}
SOMETIMES: dict[str, list[str]] = {
    "A handler or a finalizer has to come within some instructions of a call of its thread.": [
        "src/millstream/__init__.py:_import:raise Reentered(*",
        "src/millstream/store/store.py:__del__:*",
        "src/millstream/store/store.py:refuse_reentered:raise error",
        "src/millstream/store/transactions.py:check:raise Reentered(",
    ],
    "Some versions of numpy raise, others give another time without a word.": [
        "src/millstream/timestamps.py:_of_numpy:same = False",
    ],
    "It takes millions of ids, which is hours of a run.": [
        "src/millstream/log/producer_ids.py:_register:raise LimitExceeded(*",
        "src/millstream/queues/dedup.py:_replace:raise LimitExceeded(*",
    ],
    "Two threads or processes have to meet within some instructions.": [
        'src/millstream/inspect/columns.py:decode:raise Invalid("bytes that are there:", leng*',
        "src/millstream/cli/demo_queue.py:work:continue",
        "src/millstream/disk/files.py:__init__:raise*",
        'src/millstream/groups/group.py:_sync_now:raise Poisoned(5, "an earlier sync failed",*',
        'src/millstream/groups/group.py:_sync_now:raise Closed(f"{self.path}: the group was r*',
        'src/millstream/groups/group.py:_check_live:raise Closed(f"{self.path}: the group is *',
        "src/millstream/log/partition.py:_provide_next:if error.errno != errno.ENOENT:*",
        "src/millstream/log/partition.py:_provide_next:raise",
        "src/millstream/log/partition.py:wait_durable:raise Indeterminate(",
        "src/millstream/log/recovery.py:_chain:continue*",
        'src/millstream/queues/handle.py:_open:raise StorageError(11, "its capacity is raised*',
        'src/millstream/queues/handle.py:_sync_now:raise Poisoned(5, "an earlier sync failed"*',
        "src/millstream/compat/__init__.py:_put_now:raise ShutDown",
        "src/millstream/store/backup.py:_copy_partition:while copied:",
        "src/millstream/store/backup.py:_copy_partition:files.remove(copied.pop())",
        "src/millstream/store/backup.py:_copy_partition:continue",
        "src/millstream/store/compactor.py:_attempt:return",
        "src/millstream/store/compactor.py:_attempt:if not self._stopping.is_set() and not se*",
        "src/millstream/store/compactor.py:_attempt:self._failed(stream.path, error)",
        "src/millstream/queues/worker.py:start_all:time.sleep(0.005)",
        'src/millstream/queues/worker.py:run:said = b""',
        "src/millstream/queues/worker.py:_begin:raise self._runs_already(run)",
        'src/millstream/groups/assignment.py:_take_up:raise Closed(f"{self.group.path}: the m*',
    ],
}
"""Lines that run in some runs and not in others: which of two wins is not for a test to say."""
