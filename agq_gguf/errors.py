"""Every error a user can meet: one base class, a few children, an exit code on each."""

from __future__ import annotations


class AgqError(Exception):
    """Base of all errors raised on purpose; the message names what was found, what was wanted and the cure.

    ``exit_code`` is what the command line returns.
    """

    exit_code = 1


class InputError(AgqError):
    """A file or an option that cannot be used: missing, damaged, of the wrong kind or shape."""

    exit_code = 2


class FormatError(InputError):
    """Bytes that are not a valid AGQ4 matrix, or a matrix that AGQ4 cannot hold."""

    exit_code = 3


class HostError(AgqError):
    """The installed llama-cpp-python (or the program that loads the plugin) cannot be used with this plugin."""

    exit_code = 4


class OutputError(AgqError):
    """The result could not be written (disk full, no permission, target in use)."""

    exit_code = 5
