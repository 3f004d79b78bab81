"""The networks that judge images: detectors, and models that answer questions."""
