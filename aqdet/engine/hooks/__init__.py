"""Hooks of the trainer, one a file."""
