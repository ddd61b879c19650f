"""An application of Celery for tests; a worker names it with ``-A celery_app``."""

import os
import time

from celery import Celery
from timing import until

import millstream.contrib.celery  # noqa: F401, names the addresses also where nothing is installed


def make(url, **settings):
    app = Celery("celery_app", broker_url=url, result_backend=url, set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=False,
        worker_send_task_events=True,
        task_send_sent_event=True,
        result_expires=3600,
        result_chord_expires=3600,
        **settings,
    )

    @app.task(shared=False, name="add")
    def add(x, y):
        return x + y

    @app.task(shared=False, name="total")
    def total(numbers):
        return sum(numbers)

    @app.task(shared=False, name="nested")
    def nested(value):
        return value

    @app.task(shared=False, name="fail")
    def fail(text):
        raise ValueError(text)

    @app.task(shared=False, name="again", bind=True, max_retries=5)
    def again(self, times):
        if self.request.retries < times:
            raise self.retry(countdown=0.05)
        return self.request.retries

    @app.task(shared=False, name="note", acks_late=True)
    def note(path, text):
        """Append a line; short ones are not torn."""
        with open(path, "a") as file:
            file.write(f"{text}\n")

    @app.task(shared=False, name="when", acks_late=True)
    def when(path):
        """Append what the clock says."""
        note(path, time.time())

    @app.task(shared=False, name="hold", acks_late=True)
    def hold(path, seconds):
        """Say that it runs, and run on until it is told to end, at most so long."""
        note(path, os.getpid())
        until(lambda: os.path.exists(f"{path}.end"), "the end", seconds)
        return os.getpid()

    @app.task(shared=False, name="early")
    def early(path, text):
        """Acknowledged early. Say what runs; "last" runs on until it is told to end."""
        note(path, text)
        if text == "last":
            until(lambda: os.path.exists(f"{path}.end"), "the end", 60.0)

    @app.task(shared=False, name="refuse", bind=True, acks_late=True)
    def refuse(self, path, requeue):
        from celery.exceptions import Reject

        note(path, "tried")
        raise Reject("no", requeue=requeue and not self.request.delivery_info.get("redelivered"))

    @app.task(shared=False, name="about", bind=True)
    def about(self):
        return dict(self.request.delivery_info), self.request.eta

    return app


if "CELERY_URL" in os.environ:
    app = make(os.environ["CELERY_URL"])
