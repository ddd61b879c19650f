"""A store: what is in it, the threads that maintain it, copies and advice."""
