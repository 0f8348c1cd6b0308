"""L1: model definitions and their maps to and from Hugging Face folders."""
