"""Errors that a user can mend: the command line prints their one line and leaves with their exit code, without a traceback."""


class UserError(Exception):
    """Something stopped the work; the message says what was got, what was expected and how to mend it."""

    exit_code = 1


class ConfigError(UserError):
    """Unusable arguments or settings."""

    exit_code = 2


class BadImage(UserError):
    """A file or bytes that cannot be used as an image."""


class CheckpointError(UserError):
    """A checkpoint folder that is incomplete, damaged, or not what was expected."""
