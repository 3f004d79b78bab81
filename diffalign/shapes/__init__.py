"""The shapes world: a small text-to-image world that ships with the package. See docs/shapes.md."""
