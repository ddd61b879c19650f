"""The process of one measurement: `python -m benchmarks.worker MODULE FUNCTION ARGUMENTS`.

Prints what the function returned as JSON and ends at once: no store is closed, nothing is synced.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def ready() -> None:
    """Tell the parent that all is prepared, and wait until it says go."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


def main() -> None:
    """Run the function."""
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
