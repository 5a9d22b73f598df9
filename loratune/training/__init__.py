"""One training: set-up, memory plan, loop, and what is printed."""
