"""Many adapters of one base: combined by arithmetic, and extracted from checkpoints.

both, errors = jlora.combine([films, tweets], [0.7, 0.3])
lora, errors = jlora.extract(base, tuned, sites, rank=16)
"""

from jlora.bank.combine import combine as combine
from jlora.bank.extract import extract as extract

__all__ = ["combine", "extract"]
