"""r1export: continual CLIP adaptation with rank-1 experts, exported once, proven, and updated in kilobytes."""

__version__ = "0.1.0"
