"""One file per model family: its stock class with plugins=, seed= and the Backbone.

presets.py names them; docs/adding_a_family.md shows how.
"""
