"""Files, limits of a container, child processes and streams: what the operating system gives."""
