"""What tests of transactions have in common: reading all of a stream, and another process."""

import subprocess
import sys


def log_of(stream):
    return [
        value
        for partition in range(stream.partitions)
        for batch in stream.read(partition=partition)
        for value in batch.values
    ]


def run(code, *arguments):
    """Another process; what it printed."""
    command = [sys.executable, "-c", "import millstream, sys\n" + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
