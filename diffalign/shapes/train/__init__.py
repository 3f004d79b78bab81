"""Training of everything the shapes world ships: `python -m diffalign.shapes.train NAME`. Each command resumes where it stopped."""
