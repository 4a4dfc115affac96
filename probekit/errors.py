"""The one family of errors, and remarks. A message says what was given, what would be right, and what to do."""

from __future__ import annotations


class ProbekitError(Exception):
    """Base of every error that probekit raises on purpose.

    Parameters
    ----------
    problem: one sentence: what was given and what was expected.
    hint: what to do about it; empty when the problem says it all.

    Examples
    --------
    >>> import probekit
    >>> try:
    ...     probekit.load("tales-untid")
    ... except probekit.ProbekitError as error:
    ...     print(error.exit_status, error.problem)
    2 there is no model 'tales-untid': no bundled model, no folder and no file has that name.
    """

    exit_status = 1

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem} {hint}".strip())
        self.problem = problem
        self.hint = hint


class InputError(ProbekitError):
    """Something that a caller handed in cannot be used: nothing was done, nothing was written.

    Examples
    --------
    >>> import probekit
    >>> try:
    ...     probekit.Sampling(temperature=-1)
    ... except probekit.InputError as error:
    ...     print(error)
    the temperature must be a number of at least 0, not -1.
    """

    exit_status = 2


class SelfCheckError(ProbekitError):
    """A model or a result does not pass a check that probekit makes on itself."""


class ResourceError(ProbekitError):
    """The machine lacks what the work needs: memory, a device, a disk."""


class Remark(UserWarning):
    """Something that a caller should know and that stops nothing; the command line prints it as one line."""
