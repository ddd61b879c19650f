"""`contrib.apscheduler`: a job store that keeps what it cannot read."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime, timedelta

import pytest

import millstream

pytest.importorskip("apscheduler")

from apscheduler.events import EVENT_JOB_REMOVED
from apscheduler.jobstores.base import ConflictingIdError, JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler

from millstream.contrib.apscheduler import MillstreamJobStore

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ran = threading.Event()


@pytest.fixture
def make(tmp_path):
    """A function that makes schedulers of one store, as its processes do."""
    made = []

    def make(paused=True, **options):
        store = MillstreamJobStore(tmp_path / "store", durability="process", **options)
        made.append(BackgroundScheduler(jobstores={"default": store}, timezone="UTC"))
        made[-1].start(paused=paused)
        return made[-1]

    yield make
    for scheduler in made:
        if scheduler.running:
            scheduler.shutdown()


def stored(scheduler):
    return scheduler._jobstores["default"]


def at(hours):
    return NOW + timedelta(hours=hours)


def test_jobs_are_found_by_id_by_time_and_by_all_processes(make):
    scheduler = make()
    for hours in (3, 1, 2):
        scheduler.add_job(print, "date", run_date=at(hours), id=f"in {hours}", args=[hours])
    scheduler.add_job(print, "interval", hours=1, id="never", next_run_time=None)
    other = stored(make())
    assert other.get_next_run_time() == at(1)
    assert [job.id for job in other.get_due_jobs(at(2))] == ["in 1", "in 2"]
    assert [job.id for job in other.get_all_jobs()] == ["in 1", "in 2", "in 3", "never"]
    assert other.lookup_job("in 3").args == (3,)
    assert other.lookup_job("in 4") is None
    scheduler.remove_job("in 1")
    scheduler.reschedule_job("in 3", trigger="date", run_date=at(0))
    assert [job.id for job in other.get_all_jobs()] == ["in 3", "in 2", "never"]
    scheduler.remove_all_jobs()
    assert (other.get_all_jobs(), other.get_next_run_time()) == ([], None)


def test_an_id_is_that_of_one_job(make):
    scheduler = make()
    job = scheduler.add_job(print, "date", run_date=NOW, id="a")
    with pytest.raises(ConflictingIdError):
        scheduler.add_job(print, "date", run_date=NOW, id="a")
    scheduler.add_job(print, "date", run_date=at(1), id="a", replace_existing=True)
    assert stored(scheduler).get_next_run_time() == at(1)
    scheduler.remove_job("a")
    for call in (
        lambda: stored(scheduler).remove_job("a"),
        lambda: stored(scheduler).update_job(job),
    ):
        with pytest.raises(JobLookupError):
            call()


def test_a_job_runs_and_is_gone_then(make):
    ran.clear()
    scheduler = make(paused=False)
    removed = threading.Event()
    scheduler.add_listener(lambda _: removed.set(), EVENT_JOB_REMOVED)
    scheduler.add_job(f"{__name__}:ran.set", "date", id="now")
    assert ran.wait(60)
    assert removed.wait(60)  # its `shutdown` does not wait for that
    scheduler.shutdown()
    assert stored(make()).get_all_jobs() == []


def test_jobs_outlive_a_killed_scheduler(make, tmp_path):
    program = """
        import os, signal, sys
        from apscheduler.schedulers.background import BackgroundScheduler
        from millstream.contrib.apscheduler import MillstreamJobStore

        store = MillstreamJobStore(sys.argv[1], durability="process")
        scheduler = BackgroundScheduler(jobstores={"default": store})
        scheduler.start()
        for number in range(20):
            scheduler.add_job(print, "interval", hours=1, id=str(number))
        scheduler.remove_job("7")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "store"]
    done = subprocess.run(command)
    assert done.returncode == -signal.SIGKILL
    ids = {job.id for job in stored(make()).get_all_jobs()}
    assert ids == {str(number) for number in range(20)} - {"7"}


def test_a_job_that_cannot_be_read_stays_stored(make, caplog, monkeypatch):
    """Other job stores remove it: a deployment without one function loses its jobs for good."""
    scheduler = make()
    monkeypatch.setattr(f"{__name__}.gone", print, raising=False)
    scheduler.add_job(f"{__name__}:gone", "date", run_date=NOW, id="a")
    scheduler.add_job(print, "date", run_date=NOW, id="b")
    monkeypatch.delattr(f"{__name__}.gone")
    assert [job.id for job in stored(scheduler).get_all_jobs()] == ["b"]
    assert "job 'a' cannot be read; it stays stored" in caplog.text
    monkeypatch.setattr(f"{__name__}.gone", print, raising=False)
    assert [job.id for job in stored(scheduler).get_all_jobs()] == ["a", "b"]


def test_what_was_not_read_for_long_is_read_anew(make, monkeypatch):
    scheduler = make()
    scheduler.add_job(print, "date", run_date=NOW, id="a")
    jobs = stored(scheduler)._jobs_of(stored(scheduler)._share)
    jobs.current()
    jobs.rows[b"b"] = jobs.rows[b"a"]  # as if a tombstone had not been seen
    monkeypatch.setattr("millstream.contrib.apscheduler.ANEW_SECONDS", -1.0)
    assert [job.id for job in stored(scheduler).get_all_jobs()] == ["a"]


def test_a_forked_process_opens_the_store_again(make):
    scheduler = make()
    scheduler.add_job(print, "date", run_date=NOW, id="a")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            stored(scheduler).remove_job("a")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert stored(scheduler).get_all_jobs() == []


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(millstream.InvalidArgument, match=r"MillstreamJobStore\(None\).*directory"):
        MillstreamJobStore(None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(millstream.StorageError, match="is not a directory"):
        MillstreamJobStore(tmp_path / "file")
    with millstream.open(tmp_path / "store") as store:
        store.stream("apscheduler-jobs", partitions=3)
    with pytest.raises(millstream.ConfigMismatch, match="partitions"):
        MillstreamJobStore(tmp_path / "store")
