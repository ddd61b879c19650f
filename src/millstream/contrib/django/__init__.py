"""Tasks of Django without a server: `MillstreamBackend`, and the command `millstream_worker`.

``pip install 'millstream[django]'``: Django 6, which has tasks, or Django 5.2 with the
package django-tasks. In the settings:

    INSTALLED_APPS = [..., "millstream.contrib.django"]      # for the command
    TASKS = {
        "default": {
            "BACKEND": "millstream.contrib.django.MillstreamBackend",
            "OPTIONS": {"path": "/var/lib/app"},
        }
    }

A task is leased to the worker that runs it, and is off its queue when it has ended: its result and
that are one transaction. If the worker is killed, another runs it.
"""

from millstream.contrib.django.backend import MillstreamBackend

__all__ = ["MillstreamBackend"]
