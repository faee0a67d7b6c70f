"""Which share of the blocks that decode steps read a cache of them would hold."""
