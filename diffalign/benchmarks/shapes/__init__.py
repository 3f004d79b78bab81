"""The shapes world as a benchmark: held-out prompts, and the judge that no method optimises."""
