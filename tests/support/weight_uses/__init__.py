"""Kinds of weight: how programs hold and use their weights, one small function a kind.

A kind is what a library's layer comes down to. `use(params, x)` is pure, takes any floating-point dtype, and contains
no jit, outer loop or batch: `tests.support.programs` puts those around it. Sizes are tiny and, if possible, all
different. The modules here fill `KINDS`.
"""

from tests.support.weight_uses import before_use, convolutions, lookups, products
from tests.support.weight_uses.kind import KINDS, Kind, bend, mesh

__all__ = ["KINDS", "Kind", "before_use", "bend", "convolutions", "lookups", "mesh", "products"]
