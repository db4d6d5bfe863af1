"""File formats: checkpoints of adapters, and the files of other libraries."""

__all__ = ["loralib", "peft"]  # pyright: ignore[reportUnsupportedDunderAll]
__docformat__ = "google"
