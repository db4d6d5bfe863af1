"""Other libraries, each tried in an environment of its own: `benchmarks.features` runs these modules."""
