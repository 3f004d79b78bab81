"""Prompt lists without rules of their own, judged by reward models: PartiPrompts, HPSv2, DrawBench."""
