"""Full runs as short Python scripts, to read, copy and change: what the two-core defaults are a small version of."""
