"""The same numbers in less time or memory; nothing else needs these to be understood."""
