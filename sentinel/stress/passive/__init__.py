"""Passive attacks: what a server reads out of one update without touching the model."""
