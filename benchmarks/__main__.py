"""`python -m benchmarks`: see report.py."""

import sys

from benchmarks.report import main

sys.exit(main())
