"""The one error that a person is meant to read, and what to say when the disk will not have it."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can put right: what is wrong, where, and what to do.

    The command line prints its message without a traceback and ends with exit code 2.
    """


def explain_disk(error: OSError) -> str:
    """What happened to a file, and what to do where it is a lack of room."""
    what = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return f"{what}: make room on the disk and start again; nothing that was done is lost"
    return f"cannot be read or written ({what})"
