"""Guidance methods on any stock pipeline, by one hook on the network that denoises. hook.py is where to start."""
