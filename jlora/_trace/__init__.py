"""What a program does with its weights: `trace` for the base, `explain` for an adapter."""
