"""The tests of jlora: `README.md` in this folder tells which folder holds what."""
