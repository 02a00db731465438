"""Engines: one process builds one, so that its peak of memory is one engine's, and whoever asked sees how far it is."""
