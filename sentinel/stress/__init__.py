"""The stress lab: attack yourself before someone else does."""
