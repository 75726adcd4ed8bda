"""Inference: who or what was in the data, told from updates."""
