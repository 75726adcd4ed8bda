"""Tensors in, tensors out: clip, grid, noise, mask. Entropy is an argument, never a global."""

from sentinel.mechanism.clip import clip_factor
from sentinel.mechanism.entropy import Entropy, SystemEntropy
from sentinel.mechanism.gaussian import GaussianMechanism
from sentinel.mechanism.grid import grid_step, rounding_reach
from sentinel.mechanism.noise import add_noise_, treat_all
from sentinel.mechanism.recipe import Recipe
from sentinel.mechanism.rounded_normal import slack
from sentinel.mechanism.transform import Prepared, prepare, transform

__all__ = [
    "Entropy",
    "GaussianMechanism",
    "Prepared",
    "Recipe",
    "SystemEntropy",
    "add_noise_",
    "clip_factor",
    "grid_step",
    "prepare",
    "rounding_reach",
    "slack",
    "transform",
    "treat_all",
]
