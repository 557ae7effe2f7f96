"""The run of the layouts, whose releases have reports."""

from layout.conftest import lab  # noqa: F401
