"""What becomes of instructions and answers behind a long text, under pruned attention."""
