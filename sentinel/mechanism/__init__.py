"""Tensors in, tensors out: clip, grid, noise, mask. Entropy is an argument, never a global."""

from sentinel.mechanism.clip import clip_factor, clip_to, limit_
from sentinel.mechanism.entropy import Entropy, SystemEntropy
from sentinel.mechanism.gaussian import GaussianMechanism
from sentinel.mechanism.grid import grid_step
from sentinel.mechanism.noise import add_noise_, standard_normal
from sentinel.mechanism.sparsify import keep_

__all__ = [
    "Entropy",
    "GaussianMechanism",
    "SystemEntropy",
    "add_noise_",
    "clip_factor",
    "clip_to",
    "grid_step",
    "keep_",
    "limit_",
    "standard_normal",
]
