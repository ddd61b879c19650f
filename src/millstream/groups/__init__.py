"""Consumer groups: who reads which partition of a stream, and how far they are."""
