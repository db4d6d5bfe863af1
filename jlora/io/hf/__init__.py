"""Models in the files of Hugging Face transformers."""

from jlora.io.hf.save_merged import save_merged as save_merged

__all__ = ["save_merged"]
__docformat__ = "google"
