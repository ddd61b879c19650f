"""Changes of streams, queues and groups that are done all or not at all."""
