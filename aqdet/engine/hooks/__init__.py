"""Hooks of the trainer, one in each file."""
