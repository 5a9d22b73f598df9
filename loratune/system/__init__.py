"""Access to the operating system: files, container limits, child processes and streams."""
