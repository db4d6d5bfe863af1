"""File formats: checkpoints of adapters, and the files of other libraries."""

__all__ = ["hf", "kohya", "loralib", "peft"]  # pyright: ignore[reportUnsupportedDunderAll]
__docformat__ = "google"
