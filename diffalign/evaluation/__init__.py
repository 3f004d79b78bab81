"""Making images of a benchmark and judging those of a folder, resumably."""
