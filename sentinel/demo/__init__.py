"""The demo: the main job on real, public data."""
