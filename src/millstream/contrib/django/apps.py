"""The app, which is there for its command."""

from django.apps import AppConfig

__all__ = ["MillstreamConfig"]


class MillstreamConfig(AppConfig):  # type: ignore[misc]
    """``"millstream.contrib.django"`` in INSTALLED_APPS."""

    name = "millstream.contrib.django"
    label = "millstream"
    verbose_name = "millstream"
