"""The bench: detectors measured on models that they were not trained on.

Everything is made from a seed: architectures, tasks, honest federations, crafted models and the
figures. Nothing of it is stored, and detectors are called as a guard calls them.
"""
