"""What is committed is applied once, whatever is dropped, closed, full or damaged before that."""

import contextlib
import gc
import threading
import warnings

import pytest
from timing import until
from transaction_steps import log_of

import millstream
from millstream import Closed, Group, Indeterminate, Queue, StoreFull, Stream, inspect
from millstream.disk import files
from millstream.disk.session import State
from millstream.log import compacted


def pending(store, fill):
    """A transaction that is committed and whose effects wait to be applied."""
    tx = store.transaction(durability="interval")
    with tx:
        fill(tx)
        tx._commit = lambda: None
    from millstream.transactions.commit import Commit

    commit, journal = Commit(tx, store._transactions.journal()), store._transactions.journal()
    with journal.holding():
        offset, _, _ = commit._record(True)
        commit._recorded()
    journal.forget(offset)  # as if of another process
    assert not journal.is_applied
    return journal


def apply(journal):
    with journal.holding():
        journal.apply_pending()


@pytest.mark.parametrize("anew", [False, True])
def test_what_was_dropped_meanwhile_gets_nothing_and_the_rest_does(store, anew):
    s, q, source, kept = (
        store.stream("s"), store.queue("q"), store.stream("in"), store.stream("kept"),
    )  # fmt: skip
    source.append_many([b"a", b"b"])
    q.put(b"old")
    consumer = source.consumer("g", delivery="exactly_once", timeout=0)
    consumer.poll()
    message = q.get()

    def fill(tx):
        tx.append(s, b"x")
        tx.put(q, b"y")
        tx.ack(message)
        tx.commit(consumer)
        tx.append(kept, b"z")

    journal = pending(store, fill)
    store.drop_stream("s")
    store.drop_queue("q")
    store.drop_stream("in")
    if anew:
        store.stream("s"), store.queue("q").put(b"new"), store.stream("in").append(b"new")
        with store.stream("in").consumer("g"):
            pass
    apply(journal)
    assert log_of(kept) == [b"z"]
    if anew:
        assert log_of(store.stream("s")) == []
        assert [m.value for m in store.queue("q").get_many(9)] == [b"new"]
        assert store.stream("in").group("g").positions()[0] is None


# What an applier does, by the method that does it; what it belongs to; how it is dropped.
STEPS = {
    "append": (Stream, "_append_share", lambda store: store.drop_stream("s")),
    "go on": (Group, "_apply", lambda store: store.drop_stream("in")),
    "put": (Queue, "_decide", lambda store: store.drop_queue("q")),
    "put again": (Queue, "_fate_of", lambda store: store.drop_queue("q")),
    "ack": (Queue, "_decide", lambda store: store.drop_queue("jobs")),
}


def pending_everywhere(store):
    """A transaction of each effect: the journal, and the consumer whose position it commits."""
    s, q, source, jobs = (
        store.stream("s"),
        store.queue("q"),
        store.stream("in"),
        store.queue("jobs"),
    )
    source.append(b"a")
    jobs.put(b"job")
    message = jobs.get()
    consumer = source.consumer("g", delivery="exactly_once", timeout=0)
    consumer.poll()

    def fill(tx):
        tx.append(s, b"x")
        tx.put(q, b"y")
        tx.ack(message)
        tx.commit(consumer)

    return pending(store, fill), consumer


def again(journal):
    """Apply as the first opener does after all processes have ended."""
    with journal.holding():
        for number, _, following, effects in journal._read(journal.applied, journal.end):
            journal.applier.apply(number, effects, synced=False, replay=True)
            journal._page.set_applied(following)


@pytest.mark.parametrize("step", STEPS)
def test_what_is_dropped_in_the_middle_of_being_applied_gets_nothing(store, monkeypatch, step):
    journal, consumer = pending_everywhere(store)
    kind, name, drop = STEPS[step]
    method, dropped = getattr(kind, name), []

    def dropping(self, *arguments):
        if not dropped and (name != "_decide" or self.name == ("jobs" if step == "ack" else "q")):
            dropped.append(drop(store))
        return method(self, *arguments)

    monkeypatch.setattr(kind, name, dropping)
    (again if step == "put again" else apply)(journal)
    assert dropped
    assert journal.is_applied
    monkeypatch.undo()
    consumer.close()
    there = (len(store.streams()), len(store.queues()))
    assert there == ((1, 2) if step in ("append", "go on") else (2, 1))
    if step != "append":
        assert log_of(store.stream("s")) == [b"x"]
    if step not in ("put", "put again"):
        assert [m.value for m in store.queue("q").get_many(9)] == [b"y"]
    if step != "ack":
        assert store.queue("jobs")._counts()["acking"] == len(store.queue("jobs")) == 0


@pytest.mark.parametrize("step", STEPS)
def test_what_is_there_is_not_skipped_where_its_handle_is_closed_meanwhile(
    store, monkeypatch, step
):
    """As where another thread closes the store: what is not applied is, by whoever comes next."""
    journal, consumer = pending_everywhere(store)
    kind, name, _ = STEPS[step]
    method = getattr(kind, name)

    def closed(self, *arguments):
        if name != "_decide" or self.name == ("jobs" if step == "ack" else "q"):
            raise Closed(f"{self.path}: closed meanwhile")
        return method(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, closed)
        with pytest.raises(Closed, match="closed meanwhile"):
            (again if step == "put again" else apply)(journal)
    assert not journal.is_applied
    apply(journal)
    assert log_of(store.stream("s")) == [b"x"]
    assert [m.value for m in store.queue("q").get_many(9)] == [b"y"]
    assert len(store.queue("jobs")) == 0
    assert store.stream("in").group("g").positions()[0].offset == 1
    consumer.close()


@pytest.mark.parametrize("when", ["looked up", "opened"])
def test_what_is_dropped_while_it_is_opened_to_be_applied_gets_nothing(store, monkeypatch, when):
    """By another process, between the look at the names and the opening, or right behind that."""
    journal, consumer = pending_everywhere(store)
    transactions = store._transactions
    dropped = []

    def gone(name, drop):
        if name not in dropped:
            dropped.append(name)
            drop(name)

    with monkeypatch.context() as patch:
        patch.setattr(transactions, "open_queues", lambda: iter(()))
        for kind, drop in (("stream", store.drop_stream), ("queue", store.drop_queue)):
            names, make = getattr(transactions, f"{kind}_names"), getattr(transactions, kind)

            def looked_up(names=names, drop=drop):
                found = names()
                for name in found:
                    if name != "@journal":
                        gone(name, drop)
                return found

            def opened(name, make=make, drop=drop):
                made = make(name)
                gone(name, drop)
                return made

            if when == "looked up":
                patch.setattr(transactions, f"{kind}_names", looked_up)
            else:
                patch.setattr(transactions, kind, opened)
        apply(journal)
    consumer.close()
    assert sorted(dropped) == ["in", "jobs", "q", "s"]
    assert journal.is_applied
    assert (store.streams(), store.queues()) == ([], [])


@pytest.mark.parametrize("anew", [False, True])
def test_stream_that_is_dropped_before_the_commit_lets_nothing_happen(any_store, anew):
    store = any_store
    s, q = store.stream("s"), store.queue("q")
    q.put(b"job")
    message = q.get()
    with pytest.raises(Closed), store.transaction() as tx:
        tx.ack(message)
        tx.append(s, b"x")
        store.drop_stream("s")
        if anew:
            store.stream("s").append(b"new")
    assert (q._counts()["leased"], q._counts()["acking"]) == (1, 0)
    message.ack()
    assert log_of(store.stream("s")) == ([b"new"] if anew else [])


def test_effects_are_not_skipped_where_the_store_is_closed_under_the_applier(tmp_path):
    store = millstream.open(tmp_path / "store")
    s = store.stream("s")
    journal = pending(store, lambda tx: tx.append(s, b"x"))
    store.session.state = State.CLOSED
    with pytest.raises(Closed), journal.holding():
        journal.apply_until(journal.end)
    store.session.state = State.OPEN
    assert not journal.is_applied
    store.close()
    with millstream.open(tmp_path / "store") as again:
        assert log_of(again.stream("s")) == [b"x"]


def test_pending_effects_are_applied_before_a_store_closes_clean(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        s, q = store.stream("s"), store.queue("q")

        def fill(tx):
            tx.append(s, b"x")
            tx.put(q, b"y")

        pending(store, fill)
        assert (log_of(s), q.peek(9)) == ([], [])
    with millstream.open(tmp_path / "store") as store:
        assert store.session.clean
        assert log_of(store.stream("s")) == [b"x"]
        assert store.queue("q").get().value == b"y"


def test_last_to_close_does_not_call_a_store_clean_whose_journal_is_not_applied(tmp_path):
    """Its committer was killed after `close` had applied the journal, and before the gate."""
    store = millstream.open(tmp_path / "store", durability="sync")
    s = store.stream("s")
    store._transactions.apply = list
    journal = pending(store, lambda tx: tx.append(s, b"x"))
    journal.sync(journal.end)
    store.close()
    notes = inspect.verify(tmp_path / "store").notes
    assert "unclean" in [note.kind for note in notes]
    with millstream.open(tmp_path / "store") as again:
        assert log_of(again.stream("s")) == [b"x"]


def test_store_closes_while_threads_commit(tmp_path):
    for turn in range(5):
        store = millstream.open(tmp_path / f"store{turn}")
        s = store.stream("s")
        counts, odd = [0] * 3, []

        def work(n, store=store, s=s, counts=counts, odd=odd):
            try:
                while True:
                    with store.transaction() as tx:
                        tx.append(s, b"%d" % n)
                    counts[n] += 1
            except Closed:
                pass
            except Indeterminate as error:
                counts[n] += error.committed
            except BaseException as error:
                odd.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        until(lambda counts=counts: min(counts) > 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            store.close()
            for thread in threads:
                thread.join(40)
                assert not thread.is_alive()
            gc.collect()
        assert odd == []
        with millstream.open(tmp_path / f"store{turn}") as again:
            found = log_of(again.stream("s"))
        for n in range(3):
            assert counts[n] <= found.count(b"%d" % n) <= counts[n] + 1


def test_full_disk_after_the_commit_is_indeterminate_and_applied_later(any_store, monkeypatch):
    store = any_store
    s, q = store.stream("s", segment_bytes=1 << 16), store.queue("q")
    s.append(b"first")
    make, full = files.make, [True]

    def no_room(path, *arguments):
        if full[0] and "/streams/s/" in path:
            raise StoreFull(28, "No space left on device", path)
        return make(path, *arguments)

    monkeypatch.setattr(files, "make", no_room)
    large = bytes(3 << 20)
    with pytest.raises(Indeterminate) as caught, store.transaction() as tx:
        tx.append(s, large)
        tx.put(q, b"m")
    assert caught.value.committed
    assert "committed" in repr(tx)
    # While it cannot be applied nothing else is committed.
    with pytest.raises(StoreFull), store.transaction() as tx:
        tx.put(q, b"refused")
    q._upkeep()
    full[0] = False
    with store.transaction() as tx:
        tx.append(s, b"last")
    assert log_of(s) == [b"first", large, b"last"]
    assert [m.value for m in q.get_many(9)] == [b"m"]


def test_what_is_prepared_is_left_undecided_while_what_is_committed_cannot_be_applied(
    any_store, monkeypatch
):
    store = any_store
    s, q = store.stream("s", segment_bytes=1 << 16), store.queue("q")
    s.append(b"first")
    journal = pending(store, lambda tx: tx.append(s, bytes(3 << 20)))
    never = journal.number_of(journal.end + 1000)  # of a process that was killed before its record
    q._prepare_put(never, 0, b"never")
    make = files.make

    def no_room(path, *arguments):
        if "/streams/s/" in path:
            raise StoreFull(28, "No space left on device", path)
        return make(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "make", no_room)
        for _ in range(2):
            store._transactions.decide_queue(q)
            assert (q._counts()["prepared"], journal.is_stuck) == (1, True)
    store._transactions.decide_queue(q)
    assert q._counts()["prepared"] == 0
    assert journal.is_applied
    assert q.peek(9) == []
    q._check()


def test_full_disk_before_the_commit_undoes_everything(any_store, monkeypatch):
    store = any_store
    s, q = store.stream("s"), store.queue("q")
    q.put(b"1")
    with store.transaction() as tx:
        tx.append(s, b"first")
    message = q.get()
    make = files.make

    def no_room(path, *arguments):
        if "@journal" in path:
            raise StoreFull(28, "No space left on device", path)
        return make(path, *arguments)

    monkeypatch.setattr(files, "make", no_room)
    with pytest.raises(StoreFull), store.transaction() as tx:
        tx.append(s, bytes(17 << 20))
        tx.ack(message)
        tx.put(q, b"2")
    assert log_of(s) == [b"first"]
    assert (q._counts()["leased"], q._counts()["prepared"]) == (1, 0)
    message.ack()


def test_failed_sync_of_the_journal_says_that_it_is_not_known(tmp_path, monkeypatch):
    store = millstream.open(tmp_path / "store", durability="sync")
    s, q = store.stream("s"), store.queue("q")
    with store.transaction() as tx:
        tx.append(s, b"first")
    sync = files.sync

    def fails(descriptor, path):
        if "@journal" in path:
            raise millstream.StorageError(5, "Input/output error", path)
        sync(descriptor, path)

    monkeypatch.setattr(files, "sync", fails)
    with pytest.raises(Indeterminate) as caught, store.transaction() as tx:
        tx.append(s, b"second")
        tx.put(q, b"m")
    assert not caught.value.committed
    with pytest.raises(millstream.StorageError), store.transaction() as tx:
        tx.append(s, b"third")
    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(millstream.StorageError):
        store.close()
    with millstream.open(tmp_path / "store") as again:
        found = log_of(again.stream("s"))
        assert found == [b"first", b"second"]
        assert again.queue("q").get(timeout=0).value == b"m"
        with again.transaction() as tx:
            tx.append(again.stream("s"), b"fourth")


def test_effects_are_not_kept_in_memory_where_another_process_applied_them(store):
    s = store.stream("s")
    journal = store._transactions.journal()
    apply_until = journal.apply_until

    def by_another(end):
        kept, journal._waiting = journal._waiting, {}
        apply_until(end)
        journal._waiting = kept

    journal.apply_until = by_another
    for _ in range(3):
        with store.transaction(durability="interval") as tx:
            tx.append(s, b"x")
    assert len(log_of(s)) == 3
    assert journal._waiting == {}


def test_checkpoint_keeps_the_journal_short_and_the_effects(tmp_path, monkeypatch):
    from millstream.transactions import journal as module

    monkeypatch.setattr(module, "CHECKPOINT_BYTES", 1 << 20)
    monkeypatch.setattr(module, "CHECKED_RECORDS", 10)
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1 << 18)
    with millstream.open(tmp_path / "store", durability="interval") as store:
        s, q = store.stream("s"), store.queue("q", payload_bytes="64MiB")
        for i in range(60):
            with store.transaction() as tx:
                tx.append_many(s, [b"%d" % i] + [bytes(1 << 15)] * 2)
                tx.put(q, b"%d" % i)
        assert compacted.extent(store._transactions.journal().stream._log(0))[0] < 3 << 20
        assert store._transactions.journal()._page.checkpoint > 0
        assert [v for v in log_of(s) if len(v) < 9] == [b"%d" % i for i in range(60)]
        assert [m.value for m in q.get_many(99)] == [b"%d" % i for i in range(60)]


def test_stream_that_is_dropped_while_all_is_synced_does_not_fail_the_commit(tmp_path, monkeypatch):
    from millstream.transactions import journal as module

    monkeypatch.setattr(module, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(module, "CHECKED_RECORDS", 1)
    with millstream.open(tmp_path / "store", durability="process") as store:
        kept = store.stream("kept")
        streams, waiting = store._streams, store._queues
        names, queues, dropped = streams.names, waiting.names, []

        def meanwhile(found, drop, name):
            """As another process, right behind the look at what there is."""
            if name in found and name not in dropped:
                dropped.append(name)
                drop(name)
            return found

        def commits():
            with store.transaction() as tx:
                tx.append(kept, b"x")

        for work in (commits, store.flush):
            store.stream("going").append(b"x")
            store.queue("gone").put(b"x")
            with monkeypatch.context() as patch:
                patch.setattr(
                    streams, "names", lambda: meanwhile(names(), store.drop_stream, "going")
                )
                patch.setattr(
                    waiting, "names", lambda: meanwhile(queues(), store.drop_queue, "gone")
                )
                work()
            assert sorted(dropped) == ["going", "gone"]
            assert (names(), queues()) == (["@journal", "kept"], [])
            dropped.clear()
        assert log_of(kept) == [b"x"]


@pytest.mark.parametrize("level", ["interval", "sync"])
def test_interrupted_behind_its_record_it_is_committed_and_the_next_goes_on(tmp_path, level):
    with millstream.open(tmp_path / "store", durability=level) as store:
        source, out = store.stream("in"), store.stream("out")
        source.append_many([b"a", b"b"])
        with source.consumer("g", delivery="exactly_once", timeout=0, max_records=1) as consumer:
            journal = store._transactions.journal()
            sync = journal.sync

            def interrupted(end):
                journal.sync = sync
                raise KeyboardInterrupt

            journal.sync = interrupted
            for expected in (KeyboardInterrupt, None):
                refused = pytest.raises(expected) if expected else contextlib.nullcontext()
                with refused, store.transaction() as tx:
                    tx.commit(consumer)
                    tx.append_many(out, consumer.poll().values)
            assert consumer.committed[0].offset == 2
        assert log_of(out) == [b"a", b"b"]


def test_second_reader_knows_the_journal_and_a_damaged_page_is_made_anew(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    report = inspect.verify(path)
    assert report.ok
    assert (report.streams, report.records) == (2, 3)
    page = path / "streams" / "@journal" / "page"
    page.write_bytes(b"rubbish".ljust(4096, b"\0"))
    report = inspect.verify(path)
    assert report.ok
    assert any(note.path == page for note in report.notes)
    with millstream.open(path) as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"y")
    with millstream.open(path) as store:
        assert log_of(store.stream("s")) == [b"x", b"y"]
    assert not inspect.verify(path).notes


def test_damaged_journal_is_named_and_repaired(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        for i in range(3):
            with store.transaction() as tx:
                tx.append(store.stream("s"), b"%d" % i * 100)
    segment = path / "streams" / "@journal" / "00000" / "0000000000000001.seg"
    raw = segment.read_bytes()
    at = raw.rindex(b"1" * 100)
    segment.write_bytes(raw[:at] + b"?" + raw[at + 1 :])
    report = inspect.verify(path)
    assert [problem.path for problem in report.problems] == [segment]
    inspect.repair(path)
    assert inspect.verify(path).ok
    with millstream.open(path) as store:
        with store.transaction() as tx:
            tx.append(store.stream("s"), b"goes on")
        assert log_of(store.stream("s"))[-1] == b"goes on"
