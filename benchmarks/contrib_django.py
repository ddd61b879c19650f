"""How many of Django's tasks a second over millstream, and over django-tasks-db with SQLite?

`python -m benchmarks.contrib_django`, or with a number of tasks. It wants Django 5.2, django-tasks
and django-tasks-db, whose rows are in a database of SQLite with WAL, as its users have it. No-op
tasks with 100 bytes, all with default settings, in turn:

- enqueued: one at a time, outside of a transaction of the database;
- done: that backlog by one process of the worker's command, from the first to the last.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 3
CASES = ("enqueued", "done")
COMMANDS = {"millstream": "millstream_worker", "sqlite": "db_worker"}


def set_up(kind, directory):
    """Settings of a project that has its tasks in a store, or in its database."""
    import django
    from django.conf import settings

    backend = {
        "millstream": "millstream.contrib.django.MillstreamBackend",
        "sqlite": "django_tasks_db.DatabaseBackend",
    }[kind]
    options = {"path": f"{directory}/store"} if kind == "millstream" else {}
    settings.configure(
        SECRET_KEY="of a benchmark",
        USE_TZ=True,
        INSTALLED_APPS=["django_tasks", "django_tasks_db", "millstream.contrib.django"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": f"{directory}/db",
                "OPTIONS": {
                    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
                    "transaction_mode": "IMMEDIATE",
                },
            }
        },
        TASKS={"default": {"BACKEND": backend, "OPTIONS": options}},
    )
    django.setup()


def tasks():
    """A task of each kind, of this module under its own name."""
    from benchmarks import contrib_django_tasks

    return contrib_django_tasks.nothing, contrib_django_tasks.look


def enqueue(kind, directory, count):
    """In a process: enqueue them; prints the rate and the ids of the first and the last."""
    from django.core.management import call_command

    set_up(kind, directory)
    call_command("migrate", verbosity=0)
    nothing, look = tasks()
    first = look.enqueue()
    payload = "x" * 100
    began = time.perf_counter()
    for _ in range(count):
        nothing.enqueue(payload)
    rate = count / (time.perf_counter() - began)
    print(json.dumps([rate, str(first.id), str(look.enqueue().id)]))


def work(kind, directory, count, first, last):
    """In a process: run the worker until it has done all; prints the rate."""
    from django.core.management import call_command

    set_up(kind, directory)
    _, look = tasks()
    options = {"batch": True, "verbosity": 0}
    if kind == "sqlite":
        options |= {"startup_delay": False, "interval": 0, "reload": False}
    call_command(COMMANDS[kind], **options)
    times = [look.get_result(one).return_value for one in (first, last)]
    print(json.dumps(count / (times[1] - times[0])))


def measure(kind, count):
    """Tasks a second, as in `CASES`."""

    def said(*arguments):
        command = [sys.executable, "-m", "benchmarks.contrib_django", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory() as directory:
        rate, first, last = said("enqueue", kind, directory, count)
        return rate, said("work", kind, directory, count, first, last)


def main(count):
    figures = {"millstream": [], "sqlite": []}
    for _ in range(ROUNDS):
        for kind, rounds in figures.items():
            rounds.append(measure(kind, count))
            print(kind, *(f"{one:,.0f}" for one in rounds[-1]), file=sys.stderr)
    print(f"{'tasks a second':16}", *(f"{case:>12}" for case in CASES))
    medians = {}
    for kind, rounds in figures.items():
        medians[kind] = [statistics.median(one) for one in zip(*rounds, strict=True)]
        print(f"{kind:16}", *(f"{one:12,.0f}" for one in medians[kind]))
    both = zip(medians["millstream"], medians["sqlite"], strict=True)
    print(f"{'ours over sqlite':16}", *(f"{ours / theirs:11.2f}x" for ours, theirs in both))


if __name__ == "__main__":
    if sys.argv[1:2] == ["enqueue"]:
        enqueue(*sys.argv[2:4], int(sys.argv[4]))
    elif sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:4], int(sys.argv[4]), *sys.argv[5:7])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000)
