"""Where the repository lies: tests read the spec, start tools and copy sources from there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARTIFACT_VECTORS = ROOT / "spec" / "vectors" / "artifacts"
