"""Full runs as Python functions: what the two-core defaults are a small version of."""
