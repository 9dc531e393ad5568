"""The two ways to load an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qformat


def load_by(loader: str, artifact: Path) -> Any:
    """Load an artifact on the CPU with `load_model`, or with transformers' `from_pretrained` after `register`."""
    if loader == "load_model":
        return qformat.load_model(artifact, device="cpu")
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from qformat.model.transformers_quantizer import METHOD

    before = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    try:
        return AutoModelForCausalLM.from_pretrained(artifact, device_map="cpu")
    finally:
        AUTO_QUANTIZER_MAPPING[METHOD] = before
