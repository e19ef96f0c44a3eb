"""What ends a command with a message and no traceback."""


class UserError(Exception):
    """Something the person who typed the command can put right; the message says how."""
