"""What the command lines share: checking an option against its choices, and running an app with one-line errors."""

import sys
from collections.abc import Iterable

import typer

from model.errors import UserError


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raises `UserError` unless the option's value is one of the choices."""
    if value not in (names := list(choices)):
        raise UserError(f"{option} {value}: there is no such choice; use {' or '.join(names)}")


def run_app(app: typer.Typer, interrupted: str) -> int:
    """Runs a typer app and returns its exit code.

    The code is 0 on success, 2 after a user's mistake, which is printed on one line, and 130 after Ctrl-C, which prints
    `interrupted`.
    """
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
