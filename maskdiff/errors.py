"""What the user did wrong, said in one line: the error type, the parser and the wrapper of every command."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from maskdiff_kernels import LibraryError


class UserError(ValueError):
    """A mistake that the user can mend. The message names what is wrong, what was given, and what to do."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """'did you mean ...' or, where nothing is near, the list of what there is."""
    known = sorted(known)
    near = get_close_matches(name, known, 1, 0.6)
    dotted = f"{prefix}." if prefix else ""
    return f"did you mean '{dotted}{near[0]}'?" if near else f"there are {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """argparse, but what it does not take is a UserError: one line with the nearest name, not how all is used."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help says what there is")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            word = rest[0].partition("=")[0]
            near = get_close_matches(word, self._option_string_actions, 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else "--help says what there is"
            raise UserError(f"unexpected {rest[0]!r}; {hint}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            raise UserError(f"{name} got {value!r}; {nearest(str(value), map(str, action.choices))}")


def first_line(error: BaseException) -> str:
    """What an error says first; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; a user's mistake ends it with one line on stderr and exit status 2.

    Anything else keeps its traceback: it is a defect of maskdiff.
    """
    try:
        main()
    except (UserError, LibraryError) as error:
        _fail(str(error), 2)
    except OSError as error:
        where = f": {os.fspath(error.filename)!r}" if error.filename is not None else ""
        _fail(f"{error.strerror or error}{where}", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
