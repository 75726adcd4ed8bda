"""The audit log: what was done, and nothing about anybody."""

from sentinel.audit.alerts import AlertEvent, Alerts
from sentinel.audit.log import AuditLog, Entry, read_log
from sentinel.audit.records import (
    GuardStarted,
    Record,
    RoundAborted,
    RoundOpened,
    RoundRefused,
    UpdateDecided,
    UpdateReleased,
    UpdateReplayed,
    UpdateWithheld,
    log2_bucket,
    score_step,
)
from sentinel.audit.verify import Findings, verify_log

__all__ = [
    "AlertEvent",
    "Alerts",
    "AuditLog",
    "Entry",
    "Findings",
    "GuardStarted",
    "Record",
    "RoundAborted",
    "RoundOpened",
    "RoundRefused",
    "UpdateDecided",
    "UpdateReleased",
    "UpdateReplayed",
    "UpdateWithheld",
    "log2_bucket",
    "read_log",
    "score_step",
    "verify_log",
]
