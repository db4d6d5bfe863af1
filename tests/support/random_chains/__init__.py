"""Random chains of structural operations on a weight, ending in a product, as hypothesis draws them."""

from tests.support.random_chains.chain import Chain, apply, seeds
from tests.support.random_chains.factored import factored_chains
from tests.support.random_chains.unrestricted import any_chains

__all__ = ["Chain", "any_chains", "apply", "factored_chains", "seeds"]
