"""L2: one task per file, scoring any Session."""
