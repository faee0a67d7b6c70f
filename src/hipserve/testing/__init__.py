"""Random cases, laws of selections, and the oracle: for tests, benchmarks and GPU checks."""
