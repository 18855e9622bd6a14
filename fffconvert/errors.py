"""The one exception that means: what was asked cannot be done, and here is what to do instead."""

from __future__ import annotations


class UserError(Exception):
    """One line: the thing, what was expected and what to do; a command then exits with 1."""


class NotWritten(UserError):
    """Raised where nothing is wrong with what was asked, but a file cannot be written, as to a full disk."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError) or not lines:
        return f"{type(error).__name__}: {''.join(lines[:1])}"  # a key alone says nothing
    return lines[0].rstrip(".:")
