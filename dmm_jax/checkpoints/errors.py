"""The error for a checkpoint that cannot be used."""

from dmm_jax.runtime.errors import UserError


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, incomplete or of the wrong kind; the message says what to do."""
