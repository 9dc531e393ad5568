"""Convert 16-bit language models to small, verifiable 4-bit artifacts, and run, evaluate and fine-tune them.

    import qformat

    qformat.convert("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-nf4")
    with qformat.open("SmolLM2-135M-Instruct-nf4") as artifact:
        weight = artifact["model.layers.0.mlp.up_proj.weight"].decode()
    assert qformat.verify("SmolLM2-135M-Instruct-nf4").passed
    model = qformat.load_model("SmolLM2-135M-Instruct-nf4")

Public names are imported on first use, so that `import qformat` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qformat.version import __version__ as __version__

if TYPE_CHECKING:
    from qformat.artifact.reading.reader import Artifact, KeptTensor, PackedTensor
    from qformat.artifact.reading.reader import open_artifact as open
    from qformat.artifact.reading.verify import IntegrityReport
    from qformat.artifact.reading.verify import verify_integrity as verify
    from qformat.artifact.writing.accept_changes import FileChange, SealResult, seal
    from qformat.converters.compare.compare import Comparison, compare
    from qformat.converters.compare.verification import Verification, verify_against_source
    from qformat.converters.convert import ConversionOptions, ConversionSummary, convert, plan
    from qformat.converters.encode.plan import Plan
    from qformat.converters.export import export
    from qformat.hub.card.prepared_card import CardOptions
    from qformat.hub.diff import Difference, diff
    from qformat.hub.fetch import FetchSummary, fetch
    from qformat.hub.publishing.publish import Published, PublishOptions, publish
    from qformat.hub.remote_verify import RemoteReport, verify_remote
    from qformat.kernels.backends import force_backend
    from qformat.model.load import load_model, load_tokenizer
    from qformat.model.transformers_quantizer import register
    from qformat.quality.calibration.settings import CalibrationSettings
    from qformat.quality.evaluation.evaluate import Evaluation, evaluate
    from qformat.quality.tuning.settings import TuningSettings
    from qformat.quality.tuning.tune import TuningJob, TuningResult, tune
    from qformat.training.result import TrainingResult
    from qformat.training.run import TrainingJob, train
    from qformat.training.settings import TrainingSettings

_PUBLIC = {
    "Artifact": "qformat.artifact.reading.reader:Artifact",
    "CalibrationSettings": "qformat.quality.calibration.settings:CalibrationSettings",
    "CardOptions": "qformat.hub.card.prepared_card:CardOptions",
    "Comparison": "qformat.converters.compare.compare:Comparison",
    "ConversionOptions": "qformat.converters.convert:ConversionOptions",
    "ConversionSummary": "qformat.converters.convert:ConversionSummary",
    "Difference": "qformat.hub.diff:Difference",
    "FileChange": "qformat.artifact.writing.accept_changes:FileChange",
    "FetchSummary": "qformat.hub.fetch:FetchSummary",
    "Evaluation": "qformat.quality.evaluation.evaluate:Evaluation",
    "IntegrityReport": "qformat.artifact.reading.verify:IntegrityReport",
    "KeptTensor": "qformat.artifact.reading.reader:KeptTensor",
    "PackedTensor": "qformat.artifact.reading.reader:PackedTensor",
    "Plan": "qformat.converters.encode.plan:Plan",
    "PublishOptions": "qformat.hub.publishing.publish:PublishOptions",
    "SealResult": "qformat.artifact.writing.accept_changes:SealResult",
    "Published": "qformat.hub.publishing.publish:Published",
    "RemoteReport": "qformat.hub.remote_verify:RemoteReport",
    "TrainingJob": "qformat.training.run:TrainingJob",
    "TrainingResult": "qformat.training.result:TrainingResult",
    "TrainingSettings": "qformat.training.settings:TrainingSettings",
    "TuningJob": "qformat.quality.tuning.tune:TuningJob",
    "TuningResult": "qformat.quality.tuning.tune:TuningResult",
    "TuningSettings": "qformat.quality.tuning.settings:TuningSettings",
    "Verification": "qformat.converters.compare.verification:Verification",
    "compare": "qformat.converters.compare.compare:compare",
    "convert": "qformat.converters.convert:convert",
    "diff": "qformat.hub.diff:diff",
    "evaluate": "qformat.quality.evaluation.evaluate:evaluate",
    "export": "qformat.converters.export:export",
    "fetch": "qformat.hub.fetch:fetch",
    "force_backend": "qformat.kernels.backends:force_backend",
    "load_model": "qformat.model.load:load_model",
    "load_tokenizer": "qformat.model.load:load_tokenizer",
    "open": "qformat.artifact.reading.reader:open_artifact",
    "plan": "qformat.converters.convert:plan",
    "publish": "qformat.hub.publishing.publish:publish",
    "register": "qformat.model.transformers_quantizer:register",
    "seal": "qformat.artifact.writing.accept_changes:seal",
    "train": "qformat.training.run:train",
    "tune": "qformat.quality.tuning.tune:tune",
    "verify": "qformat.artifact.reading.verify:verify_integrity",
    "verify_against_source": "qformat.converters.compare.verification:verify_against_source",
    "verify_remote": "qformat.hub.remote_verify:verify_remote",
}

__all__ = [
    "Artifact",
    "CalibrationSettings",
    "CardOptions",
    "Comparison",
    "ConversionOptions",
    "ConversionSummary",
    "Difference",
    "Evaluation",
    "FetchSummary",
    "FileChange",
    "IntegrityReport",
    "KeptTensor",
    "PackedTensor",
    "Plan",
    "PublishOptions",
    "Published",
    "RemoteReport",
    "SealResult",
    "TrainingJob",
    "TrainingResult",
    "TrainingSettings",
    "TuningJob",
    "TuningResult",
    "TuningSettings",
    "Verification",
    "compare",
    "convert",
    "diff",
    "evaluate",
    "export",
    "fetch",
    "force_backend",
    "load_model",
    "load_tokenizer",
    "open",
    "plan",
    "publish",
    "register",
    "seal",
    "train",
    "tune",
    "verify",
    "verify_against_source",
    "verify_remote",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qformat' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
