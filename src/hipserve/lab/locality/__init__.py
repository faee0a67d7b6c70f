"""Whether attention is local in each domain, and whether that says which heads pruning hurts."""
