"""L0: tokenizers and chat templates, torch-free."""
