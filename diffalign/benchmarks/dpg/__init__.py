"""DPG-Bench (Hu et al., ELLA, arXiv 2403.05135): questions about dense prompts."""
