"""Full runs as short Python scripts, to read, copy and change."""
