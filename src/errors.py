"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input, told in one line that names the file, line or key and what to do. Exit status 2."""
