"""A base model and its tokenizer: finding, checking, loading, fingerprinting, generating answers."""
