"""L3: one runtime format per file."""
