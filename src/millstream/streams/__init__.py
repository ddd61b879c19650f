"""A stream as its users see it: appending, producers, views, figures."""
