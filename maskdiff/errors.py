"""What the user did wrong, said in one line: the error type and the wrapper of every command."""

import os
import sys
from collections.abc import Callable

from maskdiff_kernels import LibraryError


class UserError(ValueError):
    """A mistake that the user can mend. The message names what is wrong, what was given, and what to do."""


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
