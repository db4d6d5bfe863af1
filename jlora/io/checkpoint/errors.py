"""What is raised where a saved adapter cannot be used."""


class CheckpointError(ValueError):
    """A saved adapter that cannot be written, trusted or understood, or that belongs to another base."""
