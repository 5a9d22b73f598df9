"""A base model and its tokenizer: found, checked, loaded, fingerprinted, asked for answers."""
