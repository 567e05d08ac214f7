"""The one error of this package: a checkpoint that cannot be used, and why."""

from dmm_jax.runtime.errors import UserError


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete, or of another kind than asked for; the message says what to do."""
