"""Error paths that no test executes, by reason: `path:function:text of the line`, each a pattern.

`tests/reached.py` says what an error path is, and fails where an entry has become untrue.
"""

UNREACHED: dict[str, list[str]] = {}
SOMETIMES: dict[str, list[str]] = {}
"""Lines that run in some runs and not in others: which of two wins is not for a test to say."""
