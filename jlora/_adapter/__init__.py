"""The public functions that create, use and change adapters: one subject a file."""
