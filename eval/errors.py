"""The error that a probe's user is meant to read."""


class EvalError(ValueError):
    """A model, tokenizer or suite that a probe cannot be run on: what, where, and why."""
