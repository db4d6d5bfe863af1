"""Other libraries, each in an environment of its own: `benchmarks.features` and `benchmarks.peers` run them."""
