"""Compares the tensors of a checkpoint with those of the model that its config.json describes.

The rules are those of loading: what a model renames, ties, ignores and may lack. The model is built on the meta device,
without memory for its weights. torch and transformers are imported only when something is compared. Run as a module, it
reads a request from its input and writes the comparison to its output, so that another process pays for the imports.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformat import strict_json
from qformat.artifact.limits import MAX_CONFIG_NBYTES
from qformat.artifact.manifest import JsonObject
from qformat.errors import ArtifactError, QformatError
from qformat.model.rules.plain_decoders import equals_plain_decoder
from qformat.names import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NBYTES = 2**28
"""Largest size in bytes of a request or an answer: 1 million tensors with names of 200 bytes."""


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """How the tensors of a checkpoint fit the model of its config.json.

    Attributes:
        not_compared: Why nothing was compared. None if the comparison took place.
        not_loaded: Names of tensors for which the model has no place.
        without_layer: Those of them that are to be packed and that the model does not ignore. `load_model` rejects such
            weights.
        missing: The model's names of the tensors that it needs and the checkpoint lacks.
        wrong_shapes: Shape in the checkpoint and shape in the model of each tensor for which they differ, by its name
            in the checkpoint.
        doubt: Why the checkpoint may belong to another model than the one that it was compared with. None if it cannot.
    """

    not_compared: str | None = None
    not_loaded: tuple[str, ...] = ()
    without_layer: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    wrong_shapes: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    doubt: str | None = None


_OWN_CODE = "the checkpoint brings its own code, which may define another model"
_NO_SIZES = f"{CONFIG_NAME} states no size of the model, so that transformers took its own defaults"


def fits_without_a_model(config: bytes, shapes: Mapping[str, Shape]) -> bool:
    """Return whether names and shapes are certainly those of the model, which `compare_with_model` would find, too.

    Args:
        config: Contents of config.json.
        shapes: Shape of every tensor before packing, by its name in the checkpoint.
    """
    return equals_plain_decoder(_read(config), shapes)


def compare_with_model(config: bytes, shapes: Mapping[str, Shape], packed: Collection[str]) -> ModelComparison:
    """Compare the names and shapes of a checkpoint with the model of its config.json.

    Nothing is compared if transformers does not know the architecture, or if it merges tensors of the checkpoint when
    it loads them, such as those of experts.

    Args:
        config: Contents of config.json.
        shapes: Shape of every tensor before packing, by its name in the checkpoint.
        packed: Names of the weights that are to be packed.
    """
    import torch
    import transformers

    from qformat.model.build import build_on_meta, names_in_model, read_config
    from qformat.model.rules.plausible_config import Evidence, check_numbers

    with tempfile.TemporaryDirectory(prefix="qformat-config-") as name:
        path = Path(name)
        (path / CONFIG_NAME).write_bytes(config)
        try:
            check_numbers(path, Evidence.of(shapes))
            read = read_config(path, trust_remote_code=False)
            model = build_on_meta(path, read, dtype=torch.bfloat16, trust_remote_code=False, attention=None)
            names = names_in_model(model, shapes, path)
        except ArtifactError as error:
            problem = error.problem.replace(str(path), "the checkpoint")
            return ModelComparison(f"{error.tensor}: {problem}" if error.tensor else problem)
        except QformatError as error:
            return ModelComparison(str(error).removeprefix(f"{path}: "))
        except Exception as error:  # noqa: BLE001  any architecture may fail in its own way; a conversion needs none
            problem = str(error).strip() or type(error).__name__
            return ModelComparison(f"transformers {transformers.__version__} cannot build the model: {problem}")
    doubt = _OWN_CODE if "auto_map" in read.to_dict() else None if _states_sizes(config) else _NO_SIZES
    return _compare(model, names, shapes, packed, doubt)


def _states_sizes(config: bytes) -> bool:
    """Return whether a config has any number of its own, or the config of a part."""
    fields = _read(config)
    fields.pop("quantization_config", None)
    return any(isinstance(value, dict) or type(value) is int for value in fields.values())


def _read(config: bytes) -> JsonObject:
    read = strict_json.loads(
        config, path=CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError, python_numbers=True
    )
    return read if isinstance(read, dict) else {}


def _compare(
    model: PreTrainedModel,
    names: Mapping[str, str],
    shapes: Mapping[str, Shape],
    packed: Collection[str],
    doubt: str | None,
) -> ModelComparison:
    from qformat.model.build import tensors_by_name
    from qformat.model.rules.loading_rules import ignored_extras, ignored_gaps

    places = tensors_by_name(model, persistent=True)
    extra = {name for name in names if names[name] not in places}
    ignored = ignored_extras(model, [names[name] for name in extra])
    absent = places.keys() - set(names.values())
    tied = {
        one
        for pair in model.all_tied_weights_keys.items()
        for one, other in (pair, pair[::-1])
        if one in absent and other not in absent
    }
    return ModelComparison(
        not_loaded=_in_order(extra, names),
        without_layer=_in_order({name for name in extra & set(packed) if names[name] not in ignored}, names),
        missing=_in_order(absent - tied - ignored_gaps(model, absent), places),
        wrong_shapes={
            name: (tuple(shapes[name]), tuple(places[inside].shape))
            for name, inside in names.items()
            if name not in extra and tuple(shapes[name]) != tuple(places[inside].shape)
        },
        doubt=doubt,
    )


def _in_order(chosen: Collection[str], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in chosen)


def as_request(config: bytes, shapes: Mapping[str, Shape], packed: Collection[str]) -> bytes:
    """Return the arguments of `compare_with_model` as the input of this module.

    Args:
        config: Contents of config.json.
        shapes: Shape of every tensor before packing, by its name in the checkpoint.
        packed: Names of the weights that are to be packed.
    """
    shown = {"config": config.decode("utf-8"), "shapes": shapes, "packed": list(packed)}
    return strict_json.dumps(shown).encode("utf-8")


def from_answer(answer: bytes) -> ModelComparison:
    """Return the comparison that this module wrote to its output.

    Args:
        answer: The output.

    Raises:
        ArtifactError: The output is not JSON.
    """
    found = _parsed(answer)
    wrong = {name: (tuple(stored), tuple(wanted)) for name, (stored, wanted) in found.pop("wrong_shapes").items()}
    lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return ModelComparison(**{**found, **lists, "wrong_shapes": wrong})


def _parsed(data: bytes) -> Any:
    return strict_json.loads(data, path="message", max_nbytes=MAX_NBYTES, error=ArtifactError)


def _main() -> None:
    request = _parsed(sys.stdin.buffer.read())
    comparison = compare_with_model(request["config"].encode("utf-8"), request["shapes"], request["packed"])
    sys.stdout.buffer.write(strict_json.dumps(asdict(comparison)).encode("utf-8"))


if __name__ == "__main__":
    _main()
