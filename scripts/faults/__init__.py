"""The faults of scripts/planted_faults.py: one module per kind, and helpers to plant them."""
