"""The tasks of `benchmarks.contrib_django`, which Django finds by the name of their module."""

import time

from django_tasks import task


@task()
def nothing(payload):
    pass


@task()
def look():
    return time.monotonic()  # of the machine, so of all processes
