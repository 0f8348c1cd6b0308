"""L1: readers, tokenizer training and the embedded command set."""
