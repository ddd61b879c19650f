"""What tests start from that make stores by the hundred."""

import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def memory_directory():
    """A directory in memory: hundreds of stores are made in it."""
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="millstream-crash-", dir=root))
    yield path
    shutil.rmtree(path, ignore_errors=True)
