"""Releases in the folder layouts of clients: one module per client, and a table of all."""
