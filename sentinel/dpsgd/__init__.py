"""DP-SGD: private training per patient or record; `Guard.private` is the way in."""

from sentinel.dpsgd.clipping import Bound, ClippedSum
from sentinel.dpsgd.loader import PrivateLoader
from sentinel.dpsgd.training import PrivateRound, PrivateTraining
from sentinel.dpsgd.units import Units
from sentinel.dpsgd.wrap import wrap

__all__ = [
    "Bound",
    "ClippedSum",
    "PrivateLoader",
    "PrivateRound",
    "PrivateTraining",
    "Units",
    "wrap",
]
