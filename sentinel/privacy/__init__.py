"""The privacy account: events, what they add up to, and the durable ledger."""

from sentinel.privacy.accounting import Promise, Spent, by_accountant, total, weigh
from sentinel.privacy.events import DpSgdEvent, Event, GaussianEvent, PromisedEvent, UnboundedEvent
from sentinel.privacy.ledger import Charge, Head, Ledger, Row

__all__ = [
    "Charge",
    "DpSgdEvent",
    "Event",
    "GaussianEvent",
    "Head",
    "Ledger",
    "Promise",
    "PromisedEvent",
    "Row",
    "Spent",
    "UnboundedEvent",
    "by_accountant",
    "total",
    "weigh",
]
