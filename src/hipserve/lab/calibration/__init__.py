"""The cheapest configuration whose loss stays below a limit, with a stated confidence."""
