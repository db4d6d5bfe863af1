"""Names and layouts of weights in PyTorch's files."""
