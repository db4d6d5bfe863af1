"""File formats: checkpoints of adapters, and the files of other libraries."""

__all__ = ["gguf", "hf", "kohya", "loralib", "peft"]  # pyright: ignore[reportUnsupportedDunderAll]
__docformat__ = "google"
