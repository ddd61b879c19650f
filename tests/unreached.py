"""Lines that no test executes, with the reason: (file, function) to why.

`tests/reached.py` fails where an entry has become untrue.
"""

UNREACHED: dict[tuple[str, str], str] = {}
