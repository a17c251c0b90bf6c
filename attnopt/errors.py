"""Errors a user can cause. Each one says what was wrong, where, and what to do next."""

from __future__ import annotations


class AttnoptError(Exception):
    """An error the user can fix (exit code 1).

    Args:
        message: what was wrong and where, in one sentence.
        hint: the next thing to do, in one sentence.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SourceError(AttnoptError):
    """The model given cannot be read: missing, corrupt, unsafe or of an unknown kind."""


class UnsupportedError(AttnoptError):
    """The model is readable, but what was asked cannot be represented for it; the message names the obstacle."""


class OptionError(AttnoptError):
    """An option or pipeline text is wrong; the message names it and the legal values."""


class VerificationError(Exception):
    """A Program broke a rule of the IR. This is a bug in attnopt or in a pass (exit code 2).

    Args:
        violations: one line per broken rule, with the nodes or sites to blame.
    """

    def __init__(self, violations: list[str]) -> None:
        super().__init__("the program is not legal:\n  " + "\n  ".join(violations))
        self.violations = violations
