"""What the command lines share: choices of options, errors in one line, and printing in any character set."""

import codecs
import gc
import io
import sys
from collections.abc import Iterable
from typing import NoReturn

import typer

from model.errors import UserError

# What is printed where a character set lacks these; other characters become question marks.
SPELLINGS = {"±": "+-", "µ": "u", "≤": "<=", "≥": ">="}


def spell_what_cannot_be_printed() -> None:
    """Lets standard output spell the characters that its character set lacks, where Python would raise."""

    def spelled(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(SPELLINGS.get(c, "?") for c in error.object[error.start : error.end]), error.end

    codecs.register_error("spelled", spelled)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="spelled")


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raises `UserError` unless the option's value is one of the choices."""
    if value not in (names := list(choices)):
        raise UserError(f"{option} {value}: there is no such choice; use {' or '.join(names)}")


def run_app(app: typer.Typer, interrupted: str) -> int:
    """Runs a typer app and returns its exit code.

    The code is 0 on success, 2 after a user's mistake, which is printed on one line, and 130 after Ctrl-C, which prints
    `interrupted`.
    """
    spell_what_cannot_be_printed()
    try:
        app(standalone_mode=False)
    except (UserError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print("error:", " ".join(message.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted:", interrupted, file=sys.stderr)
        return 130
    return 0


def leave(code: int) -> NoReturn:
    """Ends the process. Python would first look through all modules for garbage, for more than a second."""
    gc.freeze()
    sys.exit(code)
