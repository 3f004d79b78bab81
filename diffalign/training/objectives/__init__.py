"""One file per paper. An objective is its settings and two functions, `collect` and `loss`; see diffalign/training/contract.py."""
