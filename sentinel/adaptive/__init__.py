"""Adaptive clipping for one site: what `max_norm = "auto"` comes to, from public history alone."""

from sentinel.adaptive.bound import Bound, Seen
from sentinel.adaptive.memory import Keeper, Memory
from sentinel.adaptive.shown import Fill, Shown, fill_of, shown
from sentinel.adaptive.sketch import sketch

__all__ = ["Bound", "Fill", "Keeper", "Memory", "Seen", "Shown", "fill_of", "shown", "sketch"]
