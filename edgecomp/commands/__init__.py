"""The commands: one module each. Parse, one library call, print."""
