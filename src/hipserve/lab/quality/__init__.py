"""Quality of pruned attention compared with dense attention: perplexity and retrieval."""
