"""GenEval (Ghosh et al., arXiv 2310.11513): prompts from its recipe, any detector, upstream's layout and results."""
