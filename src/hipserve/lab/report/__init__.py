"""One page from what the commands of the lab measure."""
