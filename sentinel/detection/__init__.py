"""Detection: how revealing is this update, and is this global model a trap?

Both are estimates with measured errors (see the cards of the bundles); sanitizing never depends on
them alone.
"""

from sentinel.detection.bundle import Detector, load_detector
from sentinel.detection.history import History
from sentinel.detection.inspection import Inspection, inspect_global_model
from sentinel.detection.probe import Probe
from sentinel.detection.reference import Reference, build_reference
from sentinel.detection.references import References
from sentinel.detection.rules import Finding, Kind
from sentinel.detection.sensitivity import SensitivityScore, score_update

__all__ = [
    "Detector",
    "Finding",
    "History",
    "Inspection",
    "Kind",
    "Probe",
    "Reference",
    "References",
    "SensitivityScore",
    "build_reference",
    "inspect_global_model",
    "load_detector",
    "score_update",
]
