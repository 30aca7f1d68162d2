"""The one exception whose text is written for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend. The text names the key or file, the value, and the way out.

    Shown without a traceback; the process exits with status 2.
    """
