"""Attestations of a release: a signature in the OpenSSF format, and a bill of materials."""
