"""A store: what is in it, the threads that look after it, copies and advice."""
