"""Tutelage: whole language-model post-training recipes as one reproducible graph."""

__version__ = "0.1.0"
