"""Path of the repository, from which tests read the specification, run tools and copy sources."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARTIFACT_VECTORS = ROOT / "spec" / "vectors" / "artifacts"
