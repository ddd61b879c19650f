"""millstream where its users already are: one module a framework, each an extra of its own.

A module stands on the public face of millstream alone, as any program of a user does, and is
imported by whoever names it.
"""
