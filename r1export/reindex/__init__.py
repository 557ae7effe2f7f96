"""Stored vectors of many pictures: embedded with onnxruntime, and embedded again where a new release asks for it."""
