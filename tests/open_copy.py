"""A copy of a directory that stays open: what the death of every process leaves."""

import os
import shutil


def copy_open(source, target):
    """Copy `source`; a temporary file that a thread renames meanwhile may be missing, no other."""

    def copy(name, into):
        try:
            shutil.copy2(name, into)
        except FileNotFoundError:
            if not os.fspath(name).endswith(".tmp"):
                raise

    shutil.copytree(source, target, copy_function=copy)
