"""File formats: checkpoints of adapters, and the files of other libraries."""
