"""What the command lines have in common: how choices are refused, and how a command ends."""

import sys
from collections.abc import Iterable

import typer

from model.errors import UserError


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raises `UserError` unless the value is one of those known."""
    if value not in (names := list(choices)):
        raise UserError(f"{option} {value}: there is no such choice; use {' or '.join(names)}")


def run_app(app: typer.Typer, interrupted: str) -> int:
    """Runs a command line; gives 0, 2 after a mistake of the user's, said in one line, or 130 after Ctrl-C."""
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
