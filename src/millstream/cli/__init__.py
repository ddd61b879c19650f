"""The command line: `millstream VERB STORE [STREAM] ...`, or `python -m millstream`.

Data goes to stdout, chatter and errors to stderr; one line says what went wrong. Exit codes:

    0    done, and everything that was checked is well
    1    a check failed: `verify` found problems, or `demo` does not agree with its source
    2    the command line makes no sense
    3    refused: no such store, stream, partition, group or queue, no permission, other settings,
         out of range; a queue that is full or has no message
    4    the storage failed: no room, corrupt, poisoned, or not known to be on disk
    130  ended by Ctrl-C, but for `work`, which drains then, as at SIGTERM, and ends with 0
    141  whoever read our stdout went away (`| head -1`); nothing is printed
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from millstream.cli import (
    advise,
    backup,
    bench,
    compact,
    configure,
    demo,
    groups,
    integrity,
    metrics,
    queues,
    records,
    relay,
    streams,
    top,
    web,
    work,
)

__all__ = ["main"]

OK, MISMATCH, USAGE, REFUSED, FAILED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 4, 130, 141

EPILOG = """\
STORE is the directory of a store, STREAM the name of a stream in it.
Data on stdout, chatter on stderr. Exit codes: 0 well; 1 a check failed; 2 usage;
3 refused or not there; 4 storage failed; 130 Ctrl-C (work: 0); 141 broken pipe."""

# Storage errors that mean "not there", "not you" or "not now" rather than "the disk failed".
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)
NOT_NOW = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EAGAIN)


class Version(argparse.Action):
    """Prints the version, which costs the import of the package only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and leave."""
        import millstream

        print(f"millstream {millstream.__version__}")
        parser.exit()


class Defaults(argparse.HelpFormatter):
    """Help that says the default of each option that takes a value, and of flags that are set."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help or ""
        unsaid = default is None or default is False or default in ([], argparse.SUPPRESS)
        if not action.option_strings or (unsaid and action.nargs == 0) or "(default: " in text:
            return action.help
        shown = f"{default:.15g}" if isinstance(default, float) else default
        if unsaid:
            shown = "as it is" if self._prog.endswith(" alter") else "none"
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """A parser that takes options also between optional arguments: `put STORE QUEUE -P 1 VALUE`."""

    mixing = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": Defaults, **options})

    def print_help(self, file: Any = None) -> None:
        """Print it, and let errors of writing out: argparse drops those of an unbuffered stdout."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and where it is explained; leave with 2."""
        super().error(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse options first, then what is left, where nothing stands in the way."""
        positional = [action for action in self._actions if not action.option_strings]
        if self.mixing or not any(action.nargs in ("?", "*") for action in positional):
            return super().parse_known_args(args, namespace)
        self.mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        except TypeError:  # an argument and an option exclude each other
            return super().parse_known_args(args, namespace)
        finally:
            self.mixing = False


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="millstream",
        description="An embedded log engine: many processes, one directory, no server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and leave")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    shown = (
        demo,
        configure,
        streams,
        records,
        groups,
        queues,
        work,
        relay,
        advise,
        metrics,
        top,
        web,
        integrity,
        backup,
        compact,
        bench,
    )
    for group in shown:
        group.register(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see the module for what the codes mean."""
    occupy_standard_descriptors()
    if sys.stdout is None:
        sys.stdout = ClosedOutput()
    try:
        try:
            args = build_parser().parse_args(argv)
            code = int(args.run(args))
        except SystemExit as left:  # argparse has printed what it had to say
            if not isinstance(left.code, int | None):
                raise
            code = left.code or 0
        flush()
        return code
    except KeyboardInterrupt:
        flush_or_mute()
        return INTERRUPTED
    except BrokenPipeError:
        mute()
        return BROKEN_PIPE
    except Exception as error:
        refused = exit_code(error)
        if refused is None:
            raise
        complain(error)
        flush_or_mute()
        return refused


def occupy_standard_descriptors() -> None:
    """Open what the caller closed of 0, 1 and 2, so that no file of a store gets their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class ClosedOutput(io.TextIOBase):
    """A stdout that the caller closed: print to None would pass for done."""

    @property
    def buffer(self) -> ClosedOutput:
        """The same for bytes."""
        return self

    def write(self, data: str | bytes) -> int:
        """Fail, but for nothing."""
        if data:
            raise OSError(errno.EBADF, "stdout is closed")
        return 0


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that a user can cause; None for a mistake of ours."""
    from millstream.errors import MillstreamError, StorageError

    if isinstance(error, StorageError) or (
        isinstance(error, OSError) and not isinstance(error, MillstreamError)
    ):
        return REFUSED if error.errno in (*NOT_THERE, *NOT_NOW) else FAILED
    return REFUSED if isinstance(error, MillstreamError) else None


# What an error advises to write in Python, and what one types here.
TYPED = (
    (
        ' alter(), or open with on_mismatch="alter" (change it) or "keep" (as it is)',
        " `millstream alter` or `millstream queue alter`",
    ),
    ("or alter(capacity=...)", "or `millstream queue alter --capacity`"),
    ("; mode='rw' with create=True makes one", "; `millstream create` makes one"),
)


def complain(error: Exception) -> None:
    """Print one line about an error on stderr."""
    text = str(error)
    for written, typed in TYPED:
        text = text.replace(written, typed)
    if isinstance(error, OSError) and error.strerror:
        text = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        text += error.strerror
    if sys.stderr is not None:
        printable = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
        print(f"millstream: {printable or type(error).__name__}", file=sys.stderr)


def flush() -> None:
    """Write out what stdout holds, so that a broken pipe or a full disk shows here."""
    sys.stdout.flush()


def flush_or_mute() -> None:
    """Write out what stdout holds if it can be; that it cannot is not news any more."""
    try:
        flush()
    except OSError:
        mute()


def mute() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
