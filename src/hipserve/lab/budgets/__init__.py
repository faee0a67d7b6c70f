"""How many keys each KV head of a model needs, where all of them together have a budget."""
