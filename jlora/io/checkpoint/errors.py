"""The error of everything that reads or writes checkpoints. This module imports nothing."""


class CheckpointError(ValueError):
    """A saved adapter cannot be written, is damaged, has an unknown format, or belongs to another base."""
