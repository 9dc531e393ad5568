"""Regenerate the generated part of the conformance corpus in spec/vectors: `python -m tools.spec.make_vectors`.

Run this only if the specification changes, never to make a test pass. Tests do not call it. It writes tensors.json,
artifacts.json and artifacts/. edited.json is written by hand and is not modified.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tools.spec.artifact_vectors import artifact_vectors
from tools.spec.reference_codec import JsonObject
from tools.spec.tensor_vectors import tensor_vectors

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"


def one_entry_a_line(document: JsonObject, list_name: str) -> bytes:
    """Return JSON with one line per vector, so that a changed vector is one changed line."""
    head = {key: value for key, value in document.items() if key != list_name}
    lines = [json.dumps(entry, ensure_ascii=False) for entry in document[list_name]]
    opening = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    body = ",\n  ".join(lines)
    return f'{opening},\n "{list_name}": [\n  {body}\n ]\n}}\n'.encode()


def main() -> None:
    tensors = tensor_vectors()
    folder = VECTORS / "artifacts"
    if folder.exists():
        shutil.rmtree(folder)
    artifacts = artifact_vectors(folder)
    made_by = {"format_version": "1.0", "made_by": "tools/spec/make_vectors.py"}
    (VECTORS / "tensors.json").write_bytes(one_entry_a_line({**made_by, "vectors": tensors}, "vectors"))
    (VECTORS / "artifacts.json").write_bytes(one_entry_a_line({**made_by, "artifacts": artifacts}, "artifacts"))
    nbytes = sum(path.stat().st_size for path in VECTORS.rglob("*") if path.is_file())
    print(f"{len(tensors)} tensors, {len(artifacts)} artifacts, {nbytes:,} bytes in total")


if __name__ == "__main__":
    main()
