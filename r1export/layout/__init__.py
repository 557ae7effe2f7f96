"""A release as the folder that a client opens: one module for each client, one table of them all."""
