"""Checkpoints: written and read whole or not at all, kept, converted, exported."""
