"""The privacy account: events, what they add up to, and the durable ledger."""

from sentinel.privacy.accounting import Promise, Spent, total
from sentinel.privacy.events import Event, GaussianEvent, UnboundedEvent
from sentinel.privacy.ledger import Charge, Head, Ledger, Row

__all__ = [
    "Charge",
    "Event",
    "GaussianEvent",
    "Head",
    "Ledger",
    "Promise",
    "Row",
    "Spent",
    "UnboundedEvent",
    "total",
]
