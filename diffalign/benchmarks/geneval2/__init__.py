"""GenEval 2 (arXiv 2512.16853): soft scores of questions about each atom of a prompt."""
