"""The lab: attacks a site's own model, data and policy, and says what came of it.

An attack is one adapter in `attacks/`; the runner takes raw and released updates through it.
"""
