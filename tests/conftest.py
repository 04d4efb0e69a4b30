"""Makes tests/ importable for the shared oracles and the rank launcher."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
