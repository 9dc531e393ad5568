"""Compares convert, verify and inspect with their peers, as complete processes in one run on one model.

Usage: python -m tools.bench.convert [--folder DIR] [--layers 22] [--runs 3] [--no-peer] [--one-tensor-gb 0]

The model is a random bf16 Llama in five shards; 22 layers have 1.1 billion parameters (TinyLlama's shape). The peers of
convert are `cp -r` of the source, and transformers' from_pretrained(load_in_4bit) + save_pretrained. The peer of verify
is `cat FILES > /dev/null`. The page cache is warm. Prints medians of the runs, and ratios.
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
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np

from qformat.artifact.header import build
from qformat.artifact.tensor_spec import TensorSpec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
N_SHARDS = 5

PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one command: median wall-clock time of its runs and largest resident set."""

    seconds: float
    rss_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="working directory [default: a temporary directory]")
    parser.add_argument("--layers", type=int, default=22, help="number of layers; 22 have 1.1 billion parameters")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="skip transformers + bitsandbytes")
    parser.add_argument("--one-tensor-gb", type=float, default=0, help="use a model of one tensor of this size in GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qformat-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        tensors = one_tensor(arguments.one_tensor_gb) if arguments.one_tensor_gb else llama(arguments.layers)
        # Write in a separate process: otherwise its memory would count in the peak of every command started here.
        writer = multiprocessing.Process(target=write_checkpoint, args=(folder / "source", tensors, arguments.layers))
        writer.start()
        writer.join()
        # One tensor is not the model of any config.json.
        how = ["--no-model-check"] if arguments.one_tensor_gb else []
        measure_all(folder, how, runs=arguments.runs, peer=not arguments.no_peer)


def measure_all(folder: Path, how: list[str], *, runs: int, peer: bool) -> None:
    source, out, copy, saved = (folder / name for name in ("source", "out", "copy", "saved"))
    qformat = str(Path(sys.executable).with_name("qformat"))
    convert = measure([qformat, "convert", str(source), str(out), *how], runs=runs, remove=out)
    rows = [("qformat convert", convert, "")]
    copied = measure(["cp", "-r", str(source), str(copy)], runs=runs, remove=copy)
    rows.append(("cp -r SOURCE", copied, f"convert takes {convert.seconds / copied.seconds:.2f} times this"))
    shutil.rmtree(copy)
    if peer:
        quantized = measure([sys.executable, "-c", PEER, str(source), str(saved)], runs=1, remove=saved)
        factor = quantized.seconds / convert.seconds
        rows.append(("transformers + bitsandbytes", quantized, f"convert is {factor:.1f} times faster"))
    verify = measure([qformat, "verify", str(out)], runs=runs)
    whole = measure([qformat, "verify", str(out), "--sha256"], runs=runs)
    cat = measure(["sh", "-c", f"cat {out}/* > /dev/null"], runs=runs)
    rows.append(("qformat verify", verify, f"{cat.seconds / verify.seconds:.2f} of the rate of cat"))
    rows.append(("qformat verify --sha256", whole, f"{cat.seconds / whole.seconds:.2f} of the rate of cat"))
    rows.append(("cat FILES > /dev/null", cat, ""))
    against = measure([qformat, "verify", str(out), "--source", str(source)], runs=1)
    rows.append(("qformat verify --source", against, ""))
    rows.append(("qformat inspect", measure([qformat, "inspect", str(out)], runs=runs), ""))
    rows.append(("qformat --help", measure([qformat, "--help"], runs=runs), ""))
    before = sum(path.stat().st_size for path in source.iterdir())
    after = sum(path.stat().st_size for path in out.iterdir())
    print(f"{before:,} bytes -> {after:,} bytes, {len(os.sched_getaffinity(0))} cores, medians of {runs}")
    print(f"{'command':28}  {'seconds':>8}  {'peak RSS':>9}")
    for label, measured, remark in rows:
        print(f"{label:28}  {measured.seconds:8.2f}  {measured.rss_mb:6.0f} MB  {remark}")


def measure(command: list[str], *, runs: int, remove: Path | None = None) -> Measured:
    """Run a command once to warm caches and then `runs` times. Remove its output directory before each run."""
    seconds, rss = [], []
    for _ in range(runs + 1):
        if remove is not None and remove.exists():
            shutil.rmtree(remove)
        started = monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        error = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{error.decode()}")
        seconds.append(monotonic() - started)
        rss.append(usage.ru_maxrss / 1024)
    return Measured(statistics.median(seconds[1:]), max(rss))


def llama(n_layers: int) -> list[TensorSpec]:
    hidden, inner, vocabulary, kv = 2048, 5632, 32000, 256
    shapes = {
        "model.embed_tokens": (vocabulary, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocabulary, hidden),
    }
    for layer in range(n_layers):
        parts = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]


def one_tensor(gigabytes: float) -> list[TensorSpec]:
    rows = int(gigabytes * 1e9) // 2 // 8192
    return [TensorSpec("model.layers.0.mlp.up_proj.weight", "BF16", (rows, 8192))]


def write_checkpoint(folder: Path, tensors: list[TensorSpec], n_layers: int) -> None:
    """Write random weights. One random array fills all tensors, which is fast to write and just as hard to encode."""
    folder.mkdir()
    stretch = np.random.default_rng(0).standard_normal(2**24, dtype=np.float32) * np.float32(0.02)
    bits = (stretch.view(np.uint32) >> 16).astype(np.uint16)
    n_shards = min(N_SHARDS, len(tensors))
    weight_map = {}
    for shard in range(n_shards):
        name = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = tensors[shard::n_shards]
        with (folder / name).open("wb") as file:
            file.write(build(part))
            for tensor in part:
                weight_map[tensor.name] = name
                remaining = tensor.nbytes // 2
                while remaining:
                    count = min(remaining, bits.size)
                    file.write(bits[:count].tobytes())
                    remaining -= count
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": n_layers}, indent=2))
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    main()
