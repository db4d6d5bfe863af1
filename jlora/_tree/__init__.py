"""Parameter trees: the names of their leaves, and quantised leaves."""
