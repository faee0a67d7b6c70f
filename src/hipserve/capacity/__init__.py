"""What fits where: bytes of weights, index, keys and values; arithmetic, without torch."""
