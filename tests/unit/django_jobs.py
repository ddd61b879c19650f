"""Tasks of a Django project: those of django-tasks' own tests, and what we need beside them."""

import importlib
import os
import signal

from django_settings import PACKAGE

task = importlib.import_module(PACKAGE).task
ran = []


@task
def noop(*args, **kwargs):
    return None


@task
async def noop_async(*args, **kwargs):
    return None


@task
def calculate_meaning_of_life():
    return 42


@task
def note(what):
    ran.append(what)


@task
def fail():
    raise ValueError("This task failed due to ValueError")


@task
def exit_system():
    raise SystemExit("This task failed due to SystemExit")


@task
def interrupt():
    raise KeyboardInterrupt("This task failed due to KeyboardInterrupt")


@task
def fail_complexly():
    raise ValueError(ValueError("This task failed"))


@task
def return_what_is_no_json():
    return lambda: True


@task
def return_too_much():
    return "x" * (17 << 20)


@task(takes_context=True)
def tell_id(context):
    return context.task_result.id


@task(takes_context=True)
def tell_attempt(context):
    return context.attempt


@task
def gone():
    """A program that was deployed later does not have it."""


@task
def say_and_wait(path):
    """Say that it runs, and wait to be told that it may end."""
    with open(path, "w") as pipe:
        pipe.write(f"{os.getpid()}\n")
    with open(path + ".end") as pipe:
        return pipe.read()


@task
def kill_worker():
    os.kill(os.getpid(), signal.SIGKILL)


@task
def write(path, number):
    """Append a line in one call, which a kill leaves standing."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(out, b"%d\n" % number)
    os.close(out)
