"""L3: one compression method per file; methods never import each other."""
