"""Plans: what a compiled program needs on hardware that need not exist."""
