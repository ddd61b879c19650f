"""Chronicle Queue 2026.4: mapped files, Java 17; synced by msync(MS_SYNC)."""

from __future__ import annotations

from benchmarks.rivals import jvm

TITLE = "Chronicle Queue 2026.4 (Java)"
WORKS = {"append 1": "append", "read each": "read", "synced 1": "sync"}


def measure(work: str, path: str, seconds: float) -> float | None:
    """Records a second; None where it has no call for it."""
    return jvm.alone("chronicle", WORKS[work], path, seconds) if work in WORKS else None
