"""Proof of what happens in a converted model."""
