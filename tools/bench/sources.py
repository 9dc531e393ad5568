"""Compares `qformat convert` of each source format with safetensors, as complete, interleaved processes.

Usage: python -m tools.bench.sources [--folder DIR] [--layers 4] [--runs 3]

The model is the random bf16 Llama of tools/bench/convert.py. Each format is compared with a safetensors checkpoint of
the decoded tensors. The values are random, since they do not affect the time. Prints the medians of wall-clock and CPU
time, their ratios to safetensors, and the largest resident set. On a shared machine, only the ratio of CPU times is
meaningful.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic

import numpy as np

from qformat.artifact.header import build
from qformat.artifact.tensor_spec import TensorSpec
from tools.bench import convert as bench_convert

GGUF_TYPES = {"Q8_0": (32, 34, (0,)), "Q4_0": (32, 18, (0,)), "Q4_K": (256, 144, (0, 2)), "Q6_K": (256, 210, (208,))}
"""Elements per block, bytes per block, and byte offsets of its float16 scales."""

EXPERTS = (16, 2880, 90)
"""Shape of the MXFP4 tensors: experts, rows, blocks of 32 per row (half of a tensor of gpt-oss-20b)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="working directory [default: a temporary directory]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qformat-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        writer = multiprocessing.Process(target=write_sources, args=(folder, arguments.layers))
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the source checkpoints could not be written")
        show(folder, runs=arguments.runs)


def show(folder: Path, *, runs: int) -> None:
    twins = {"mxfp4": "experts"}
    sources = sorted(path for path in folder.iterdir() if path.is_dir())
    wall: dict[str, list[float]] = {source.name: [] for source in sources}
    cpu: dict[str, list[float]] = {source.name: [] for source in sources}
    rss = dict.fromkeys(wall, 0.0)
    for run in range(runs + 1):  # the first run warms the caches
        for source in sources:
            taken, spent, resident = convert(source, folder / "out")
            rss[source.name] = max(rss[source.name], resident)
            if run:
                wall[source.name].append(taken)
                cpu[source.name].append(spent)
    print(f"medians of {runs}, {len(os.sched_getaffinity(0))} cores")
    print(f"{'source':20} {'on disk':>9} {'wall s':>8} {'ratio':>6} {'CPU s':>8} {'ratio':>6} {'peak RSS':>9}")
    for source in sources:
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        figures = ""
        for seconds in (wall, cpu):
            median = statistics.median(seconds[source.name])
            ratio = median / statistics.median(seconds[twins.get(source.name, "safetensors")])
            figures += f"{median:8.2f} {ratio:6.2f} "
        print(f"{source.name:20} {nbytes / 1e6:6.0f} MB {figures}{rss[source.name]:6.0f} MB")


def convert(source: Path, out: Path) -> tuple[float, float, float]:
    """Return wall-clock seconds, CPU seconds and peak resident memory in MB of one conversion."""
    shutil.rmtree(out, ignore_errors=True)
    qformat = str(Path(sys.executable).with_name("qformat"))
    started = monotonic()
    process = subprocess.Popen(
        [qformat, "convert", str(source), str(out), "--no-model-check"], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    taken = monotonic() - started
    shutil.rmtree(out, ignore_errors=True)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"convert {source}: exit code {process.returncode}")
    return taken, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def write_sources(folder: Path, n_layers: int) -> None:
    tensors = bench_convert.llama(n_layers)
    bench_convert.write_checkpoint(folder / "safetensors", tensors, n_layers)
    write_bin(folder / "torch_bin", folder / "safetensors")
    write_fp8(folder / "fp8", tensors, n_layers)
    for kind in GGUF_TYPES:
        write_gguf(folder / f"gguf {kind}", tensors, n_layers, kind)
    adopt(folder / "bitsandbytes_4bit", folder / "safetensors")
    write_experts(folder)


def write_bin(out: Path, source: Path) -> None:
    import torch
    from safetensors.torch import load_file

    out.mkdir()
    shutil.copy(source / "config.json", out)
    tensors = {name: value for path in sorted(source.glob("*.safetensors")) for name, value in load_file(path).items()}
    torch.save(tensors, out / "pytorch_model.bin")


def write_fp8(out: Path, tensors: list[TensorSpec], n_layers: int) -> None:
    stored: list[TensorSpec] = []
    for tensor in tensors:
        if "_proj" in tensor.name:
            grid = tuple(-(-size // 128) for size in tensor.shape)
            stored.append(TensorSpec(tensor.name, "F8_E4M3", tensor.shape))
            stored.append(TensorSpec(tensor.name + "_scale_inv", "F32", grid))
        else:
            stored.append(tensor)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**bench_convert.CONFIG, "num_hidden_layers": n_layers, "quantization_config": quantization}
    write_random(out, stored, config)


def write_experts(folder: Path) -> None:
    n_experts, n_rows, n_groups = EXPERTS
    names = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(4)]
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "tie_word_embeddings": False}
    shape = (n_experts, 32 * n_groups, n_rows)
    write_random(folder / "experts", [TensorSpec(name, "BF16", shape) for name in names], config)
    stored = [TensorSpec(name + "_blocks", "U8", (n_experts, n_rows, n_groups, 16)) for name in names]
    stored += [TensorSpec(name + "_scales", "U8", (n_experts, n_rows, n_groups)) for name in names]
    write_random(folder / "mxfp4", stored, {**config, "quantization_config": {"quant_method": "mxfp4"}})


def write_random(out: Path, tensors: list[TensorSpec], config: Mapping[str, object]) -> None:
    """Write a checkpoint of random values: small floats, and bytes below 120."""
    out.mkdir()
    rng = np.random.default_rng(0)
    makers: dict[str, Callable[[int], np.ndarray]] = {
        "BF16": lambda n: (rng.standard_normal(n, np.float32).view(np.uint32) >> 16).astype(np.uint16),
        "F32": lambda n: rng.uniform(1e-4, 1e-3, n).astype(np.float32),
    }
    ordered = sorted(tensors, key=lambda tensor: tensor.dtype != "F32")  # keeps tensors aligned without padding
    with (out / "model.safetensors").open("wb") as file:
        file.write(build(ordered))
        for tensor in ordered:
            n = int(np.prod(tensor.shape))
            make = makers.get(tensor.dtype, lambda n: rng.integers(0, 120, n, np.uint8))
            file.write(make(n).tobytes())
    (out / "config.json").write_text(json.dumps(config))


def write_gguf(out: Path, tensors: list[TensorSpec], n_layers: int, kind: str) -> None:
    import gguf

    from qformat.converters.sources.gguf.architectures import ARCHITECTURES, OUTSIDE

    names = {part.name: name for name, part in ARCHITECTURES["llama"].parts.items()}
    outside = {part.name: name for name, part in OUTSIDE.items()}
    config = bench_convert.CONFIG
    out.mkdir()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(out / "model.gguf"), "llama", use_temp_file=False)
    writer.add_block_count(n_layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    block_size, block_nbytes, places = GGUF_TYPES[kind]
    for tensor in tensors:
        _, layer, part = tensor.name.partition(".layers.")
        number, _, inner = part.partition(".")
        name = f"blk.{number}.{names[inner]}" if layer else outside[tensor.name]
        if len(tensor.shape) == 1:
            writer.add_tensor(name, np.ones(tensor.shape, np.float32))
            continue
        shape = (tensor.shape[0], tensor.shape[1] // block_size, block_nbytes)
        blocks = rng.integers(0, 256, shape, np.uint8)
        for place in places:
            blocks[..., place : place + 2] = rng.uniform(1e-4, 1e-3, shape[:-1]).astype("<f2")[..., None].view(np.uint8)
        writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (out / "tokenizer.json").write_text("{}")


def adopt(out: Path, source: Path) -> None:
    """Convert a source and remove the manifest, which leaves a bitsandbytes checkpoint."""
    convert(source, out)
    qformat = str(Path(sys.executable).with_name("qformat"))
    subprocess.run(
        [qformat, "convert", str(source), str(out), "--no-model-check"], check=True, stdout=subprocess.DEVNULL
    )
    (out / "qformat.json").unlink()


if __name__ == "__main__":
    main()
