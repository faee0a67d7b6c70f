"""Which key may stand for a range of keys, and how far that follows from correlation alone."""
