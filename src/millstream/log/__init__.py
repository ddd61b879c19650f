"""A log: its partitions, what their files hold, and how they are read, mended and shortened."""
