"""Faults that scripts/planted_faults.py plants in a run: one module for each kind, and what it takes to plant one."""
