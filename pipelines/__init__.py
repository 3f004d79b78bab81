"""Stock diffusers pipelines whose call also takes `plugins=` and `seed=`, and which expose a differentiable noise -> image path.

presets.py is the literal table of models, aligned.py the mixin, one further file for each model family. Importing this package imports
nothing heavy; load a pipeline with `diffalign.load_pipeline(...)`.
"""
