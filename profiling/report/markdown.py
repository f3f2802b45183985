"""Tables in Markdown."""


def line(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def head(*names: str) -> list[str]:
    """The first two rows of a table, with the names of its columns."""
    return [line(*names), line(*("---" for _ in names))]
