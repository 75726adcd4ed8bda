"""The ranks' own module is imported by name, in the test and in every rank."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
