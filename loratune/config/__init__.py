"""YAML to checked sections, each problem with its place; knows no recipe."""
