"""L5: one file per verb."""
