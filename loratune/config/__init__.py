"""Parse YAML into checked sections and report each problem with its place; independent of the recipe's sections."""
