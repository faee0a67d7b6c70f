"""Makes the keys and values that a step reads present in an arena of tiles."""
