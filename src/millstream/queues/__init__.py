"""A queue: its files, its messages, and the workers that take them."""
