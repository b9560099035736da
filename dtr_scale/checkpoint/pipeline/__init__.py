"""Hold the code that an export for diffusers carries along, one file per component.

Each file is copied as it is, and runs where this package is not installed: it imports torch, numpy
and diffusers alone, and nothing of its neighbours.
"""
