"""What an adapter file holds, and what of it jlora would refuse; without a model."""

from jlora.io.info.api import info as info
from jlora.io.info.report import Info as Info

__all__ = ["Info", "info"]
__docformat__ = "google"
