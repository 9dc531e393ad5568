"""Small checkpoints of the kinds that are decoded while they are read, and how tests read them."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file

from qformat.converters.sources.source import Source
from tests.small_models import SIDE_FILES, Tensor, llama_config, llama_tensors, raw_tensor, tensor_of, write_checkpoint

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def fp8(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """Return random E4M3 codes, none of them NaN."""
    codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    codes[(codes & 127) == 127] = 0
    return Tensor("F8_E4M3", shape, codes.tobytes())


def scales(shape: tuple[int, ...], dtype: str = "F32", *, seed: int = 1) -> Tensor:
    return tensor_of(np.random.default_rng(seed).uniform(1e-4, 1e-3, shape), dtype)


def write_fp8(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, object] | None = None) -> Path:
    config = {**llama_config(), "quantization_config": FP8 if quantization is None else quantization}
    return write_checkpoint(folder, {**llama_tensors(), **tensors}, config=config)


def read(source: Source, name: str, *, chunk_nbytes: int) -> np.ndarray:
    """Return a tensor's bytes, read in pieces as a conversion does."""
    tensor = source.tensors[name]
    data = np.empty(tensor.nbytes, np.uint8)
    for start in range(0, tensor.nbytes, chunk_nbytes):
        source.read_into(tensor, start, data[start : start + chunk_nbytes].data)
    return data


EXPERTS = "model.layers.0.mlp.experts."
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
}


def experts(name: str, *, n_experts: int, n_rows: int, n_groups: int, seed: int = 0) -> dict[str, Tensor]:
    exponents = np.random.default_rng(seed).integers(0, 255, (n_experts, n_rows, n_groups), np.uint8)
    return {
        EXPERTS + name + "_blocks": raw_tensor("U8", (n_experts, n_rows, n_groups, 16), seed=seed),
        EXPERTS + name + "_scales": Tensor("U8", exponents.shape, exponents.tobytes()),
    }


def write_mxfp4(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_checkpoint(folder, {**llama_tensors(), **tensors}, config=GPT_OSS)


QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_compute_dtype": "float16",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None,
}


def packed(weight: torch.Tensor, name: str, *, double_quant: bool = True, block_size: int = 64, kind: str = "nf4",
           storage: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return the tensors that bitsandbytes stores for a weight."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type=kind, quant_storage=storage
    )
    return {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def bnb_llama(**options: object) -> dict[str, torch.Tensor]:
    """Return a small Llama whose projections are packed."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in llama_tensors().items():
        weight = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16).reshape(tensor.shape)
        found |= packed(weight, name, **options) if "_proj" in name else {name: weight}  # type: ignore[arg-type]
    return found


def write_bnb(folder: Path, tensors: dict[str, torch.Tensor], **quantization: object) -> Path:
    folder.mkdir()
    config = {**llama_config(), "quantization_config": {**QUANTIZATION, **quantization}}
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in SIDE_FILES.items():
        (folder / name).write_bytes(data)
    save_file(tensors, folder / "model.safetensors")
    return folder


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def torch_llama(dtype: str = "BF16") -> dict[str, torch.Tensor]:
    """Return the tensors of `llama_tensors` as torch tensors."""
    return {
        name: torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[dtype]).reshape(tensor.shape)
        for name, tensor in llama_tensors(dtype=dtype).items()
    }


def write_bin(folder: Path, tensors: object, *, config: dict[str, object] | None = None) -> Path:
    """Write a checkpoint of one file, as `save_pretrained` did before safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama_config() if config is None else config))
    for name, data in SIDE_FILES.items():
        (folder / name).write_bytes(data)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def fp8_source(folder: Path) -> Path:
    stored = {}
    for layer in range(2):
        for part, shape in (("q_proj", (32, 32)), ("k_proj", (32, 32)), ("v_proj", (32, 32))):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            stored |= {name: fp8(shape, seed=layer), name + "_scale_inv": scales((1, 1), seed=layer)}
    return write_fp8(folder, stored)
