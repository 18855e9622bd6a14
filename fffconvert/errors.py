"""The one exception that means: what was asked cannot be done, and here is what to do instead."""

from __future__ import annotations


class UserError(Exception):
    """Raised with one line that names the thing, what was expected and what to do.

    The command line prints it and exits with 1; a caller in Python catches it like any other.
    """
