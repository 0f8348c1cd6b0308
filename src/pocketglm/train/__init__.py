"""L2: the training loop and fine-tuning."""
