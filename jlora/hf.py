"""Models in the files of Hugging Face transformers: the public name of `jlora.io.hf`."""

from jlora.io.hf import save_merged as save_merged

__all__ = ["save_merged"]
__docformat__ = "google"
