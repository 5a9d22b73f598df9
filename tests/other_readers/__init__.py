"""Folders that other programs read: `make other-readers` trains them here and reads them with transformers 4."""
