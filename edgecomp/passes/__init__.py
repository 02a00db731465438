"""Passes over neutral graphs: one module each."""
