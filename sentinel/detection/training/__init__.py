"""Training of the detectors: needs the extra `train`; nothing here runs on a hospital's machine.

It takes its corpus as an argument: the generator lives with the stress lab.
"""

from sentinel.detection.training.global_model import ModelCorpus, train_global_model
from sentinel.detection.training.sensitivity import train_sensitivity

__all__ = ["ModelCorpus", "train_global_model", "train_sensitivity"]
