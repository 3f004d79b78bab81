"""Tuning: one loop, one file per objective. A policy is a denoiser that learns, the reference the same one before it did."""
