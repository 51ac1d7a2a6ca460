"""Errors a user can act on: shown as one paragraph, without a traceback, by the command line."""


class UserError(Exception):
    """Something the user can mend; the message names the file or key, the value, and the fix."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot work; the message names the key, the value and the valid choices."""


class DataError(UserError, ValueError):
    """A data set, table or image that cannot be used; the message names the file, the field and the fix."""
