"""Exact softmax attention over sinks, chosen blocks and window."""
