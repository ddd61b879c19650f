"""Settings of a Django project that has its tasks in a store; DJANGO_DIRECTORY is where."""

import os

import django

PACKAGE = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"
DIRECTORY = os.environ["DJANGO_DIRECTORY"]
SECRET_KEY = "of a test"
USE_TZ = True
INSTALLED_APPS = ["millstream.contrib.django"]
if PACKAGE == "django_tasks":
    INSTALLED_APPS.append("django_tasks")
DATABASES = {
    name: {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": f"{DIRECTORY}/{name}.db",
        "TEST": {"NAME": f"{DIRECTORY}/test-{name}.db"},
    }
    for name in ("default", "other")
}
TASKS = {
    "default": {
        "BACKEND": "millstream.contrib.django.MillstreamBackend",
        "QUEUES": ["default", "queue-1"],
        "OPTIONS": {
            "path": f"{DIRECTORY}/store",
            "durability": "process",
            "capacity": 2000,
            "max_attempts": int(os.environ.get("DJANGO_ATTEMPTS", "12")),
        },
    },
    "dummy": {"BACKEND": f"{PACKAGE}.backends.dummy.DummyBackend"},
}
