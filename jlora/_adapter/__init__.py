"""What one does with adapters: one public verb a file."""
