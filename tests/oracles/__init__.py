"""Independent float64 references. They import nothing of PocketGLM."""
