"""T2I-CompBench and T2I-CompBench++ (Huang et al., arXiv 2307.06350)."""
