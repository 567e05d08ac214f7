"""The one error of this package: a checkpoint that cannot be used, and why."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or of another kind than asked for; the message says what to do."""
