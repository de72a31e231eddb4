"""The one error that a person is meant to read, and the end that a machine asks for."""


class UserError(ValueError):
    """Something the user can put right: what is wrong, where, and what to do.

    A command line prints its message without a traceback and ends with exit code 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and containers send it: everything ends as on Ctrl-C."""
