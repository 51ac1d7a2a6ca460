"""Errors a user can act on: shown as one paragraph, without a traceback, by the command line."""


class UserError(Exception):
    """An error that the user can fix; the message names the file or key, the value, and the fix.

    On purpose not a ``ValueError``: jsonargparse would take those for a wrong type and bury the message.

    Attributes:
        exit_code: What the command line returns where it ends by this error.
    """

    exit_code = 2


class ConfigError(UserError):
    """A configuration value that is not valid; the message names the key, the value and the valid choices."""


class DataError(UserError):
    """A data set, table or image that cannot be used; the message names the file, the field and the fix."""


class NoImagesError(DataError):
    """A data set that lists no image at all; a federation leaves such a site out."""
