"""Staging a program, and what it does with its weights."""
