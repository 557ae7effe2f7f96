"""Stored vectors of image collections: computed with onnxruntime, and re-computed where a new release needs it."""
