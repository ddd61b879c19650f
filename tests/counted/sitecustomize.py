"""What every interpreter of a measuring run begins with: count, and write the counts at each end.

coverage starts here, too, for children whose environment names it. The counts of C are written at
exit, so that a process that leaves by `os._exit`, or kills itself, has to do it before. Of a
process that another one kills they are lost.
"""

import ctypes
import os
import sys

import coverage

coverage.process_startup()
exit_now, kill = os._exit, os.kill


def write_counts() -> None:
    native = sys.modules.get("millstream._native")
    if native is not None:
        counts = ctypes.CDLL(native.__file__)
        counts.__gcov_dump()
        counts.__gcov_reset()  # or a signal that is handled ends the counting


def _exit(status: int) -> None:
    write_counts()
    exit_now(status)


def _kill(process: int, number: int) -> None:
    if process == os.getpid() and number in (9, 15):
        measured = coverage.Coverage.current()
        if measured is not None:
            measured.save()
        write_counts()
    kill(process, number)


os._exit, os.kill = _exit, _kill
