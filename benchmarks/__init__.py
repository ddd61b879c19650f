"""How fast millstream is on this machine, against its limits and its rivals: see README.md."""
