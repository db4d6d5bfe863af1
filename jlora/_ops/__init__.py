"""Products of activations with the factors of an update."""
