"""Malicious servers, and the honest one that they pass for.

`RECIPES` lists them by family; `measure` says how much one really leaks.
"""

from __future__ import annotations

from sentinel.stress.layers import attacked_pair, copied, layer_inputs, linear_layers
from sentinel.stress.servers.binning import binning, isolation, sparse_binning
from sentinel.stress.servers.catalogue import RECIPES, Recipe, recipe
from sentinel.stress.servers.convolutions import loki, pass_through
from sentinel.stress.servers.craft import Craft, Learner, Public, honest, then
from sentinel.stress.servers.federation import FedAvgServer, MaliciousServer
from sentinel.stress.servers.fishing import class_separation, fishing_class, fishing_feature
from sentinel.stress.servers.leak import Leak, measure, measure_search, measure_sum
from sentinel.stress.servers.learned import learned_dominance, learned_neurons
from sentinel.stress.servers.lines import Direction
from sentinel.stress.servers.rows import PLAIN, Stealth
from sentinel.stress.servers.scan import Search, scan
from sentinel.stress.servers.seer import seer, seer_secret
from sentinel.stress.servers.sparse import qbi, trap_weights
from sentinel.stress.servers.stealth import WRAPPERS, blended
from sentinel.stress.servers.suppression import suppression
from sentinel.stress.servers.transformer import token_bins, transparent_attention

__all__ = [
    "PLAIN",
    "RECIPES",
    "WRAPPERS",
    "Craft",
    "Direction",
    "FedAvgServer",
    "Leak",
    "Learner",
    "MaliciousServer",
    "Public",
    "Recipe",
    "Search",
    "Stealth",
    "attacked_pair",
    "binning",
    "blended",
    "class_separation",
    "copied",
    "fishing_class",
    "fishing_feature",
    "honest",
    "isolation",
    "layer_inputs",
    "learned_dominance",
    "learned_neurons",
    "linear_layers",
    "loki",
    "measure",
    "measure_search",
    "measure_sum",
    "pass_through",
    "qbi",
    "recipe",
    "scan",
    "seer",
    "seer_secret",
    "sparse_binning",
    "suppression",
    "then",
    "token_bins",
    "transparent_attention",
    "trap_weights",
]
