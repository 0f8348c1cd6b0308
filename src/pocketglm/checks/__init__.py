"""Looks at what an export will be, or is: one check a file."""
