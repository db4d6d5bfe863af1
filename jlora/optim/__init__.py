"""What optax needs to know of adapters."""
