"""The methods of PEFT: which work on packed weights, and which are refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train with PEFT.

    Attributes:
        name: Name in the table of `docs/programs.md`.
        config: Makes the configuration.
        fast: Whether the method is in the short selection that runs with every change.
        noise: Standard deviation of what is added to the weights that PEFT starts from: some methods need more than
            others to move the logits.
        call: What the method's `forward` takes in addition.
        bf16_norms: Whether PEFT computes norms of the decoded weights, which it gets in bf16.
        needs: A package that the method imports, and that is installed with the extra `clients` only.
        encodes: Whether the method changes the packed weights before it starts, so that they are rounded again.
    """

    name: str
    config: partial[Any]
    fast: bool = False
    noise: float = 0.05
    call: tuple[str, ...] = ()
    bf16_norms: bool = False
    needs: str | None = None
    encodes: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A method that PEFT, torch or qformat refuses on packed weights, and a part of the message."""

    method: Method
    message: str


def method(
    name: str,
    config: Any,
    *,
    fast: bool = False,
    noise: float = 0.05,
    call: tuple[str, ...] = (),
    bf16_norms: bool = False,
    needs: str | None = None,
    encodes: bool = False,
    **options: Any,
) -> Method:
    options = {"target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | options
    return Method(name, partial(config, **options), fast, noise, call, bf16_norms, needs, encodes)


def lora(name: str, **options: Any) -> Method:
    return method(name, peft.LoraConfig, **{"r": 4, "lora_alpha": 8} | options)


def prompts(name: str, config: Any, *, fast: bool = False, call: tuple[str, ...] = (), **options: Any) -> Method:
    return Method(name, partial(config, task_type="CAUSAL_LM", **options), fast, call=call)


WORKING = (
    lora("LoRA", target_modules="all-linear", fast=True),
    lora("LoRA", use_rslora=True),
    lora("LoRA", lora_bias=True),
    lora("LoRA", bias="all"),
    lora("LoRA", bias="lora_only"),
    lora("LoRA", init_lora_weights="gaussian"),
    lora("LoRA", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    lora("LoRA", layer_replication=[[0, 2], [1, 2]]),
    lora("LoRA", layers_to_transform=[1]),
    lora("LoRA", modules_to_save=["lm_head", "norm"], fast=True),
    lora("LoRA", trainable_token_indices=[1, 4]),
    lora("LoRA", target_modules=["embed_tokens", "lm_head", "q_proj"]),
    lora("OLoRA", init_lora_weights="olora", fast=True, encodes=True),
    lora("EVA", init_lora_weights="eva"),
    lora("DoRA", use_dora=True, bf16_norms=True, fast=True),
    lora("QALoRA", use_qalora=True, qalora_group_size=16),
    lora("aLoRA", alora_invocation_tokens=[3, 4], fast=True),
    lora("MonteCLoRA", monteclora_config=MontecloraConfig()),
    method("AdaLoRA", peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, fast=True),
    method("IA3", peft.IA3Config, target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], fast=True),
    method("OFT", peft.OFTConfig, r=0, oft_block_size=16),
    method("OFT", peft.OFTConfig, r=0, oft_block_size=16, coft=True, eps=0.1),
    method("BOFT", peft.BOFTConfig, boft_block_size=16),
    method("VeRA", peft.VeraConfig, r=8, noise=0.2),
    method("PVeRA", peft.PveraConfig, r=8, noise=0.2),
    method("RandLoRA", peft.RandLoraConfig, r=8),
    method("VB-LoRA", peft.VBLoRAConfig, r=2, num_vectors=8, vector_length=32, topk=2, noise=0.5),
    method("FourierFT", peft.FourierFTConfig, n_frequency=20),
    method("WaveFT", peft.WaveFTConfig, n_frequency=20),
    method("MiSS", peft.MissConfig, r=8),
    method("C3A", peft.C3AConfig, block_size=32, fast=True),
    method("GraLoRA", peft.GraloraConfig, r=8, gralora_k=2),
    method("RoAd", peft.RoadConfig, group_size=16),
    method("BEFT", peft.BeftConfig),
    method("Lily", peft.LilyConfig, r=4),
    method("Poly", peft.PolyConfig, r=4, call=("task_ids",)),
    method("LN tuning", peft.LNTuningConfig, target_modules=["input_layernorm", "norm"]),
    prompts("trainable tokens", peft.TrainableTokensConfig, token_indices=[1, 4]),
    prompts("prompt tuning", peft.PromptTuningConfig, num_virtual_tokens=4, fast=True),
    prompts(
        "multitask prompt tuning",
        peft.MultitaskPromptTuningConfig,
        num_virtual_tokens=4,
        num_tasks=2,
        call=("task_ids",),
    ),
    prompts("P-tuning", peft.PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=16),
    prompts("prefix tuning", peft.PrefixTuningConfig, num_virtual_tokens=4),
    prompts("Cartridge", peft.CartridgeConfig, num_virtual_tokens=4),
    prompts("adaption prompt", peft.AdaptionPromptConfig, adapter_len=4, adapter_layers=2),
    prompts(
        "CPT", peft.CPTConfig, cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1, 1, 1, 1], cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
)
"""Methods that train packed layers as they train the decoded model."""

OURS = "does not work on 4-bit weights"
BYTES = "float|Byte|uint8"
SHAPES = "multiplied"
REFUSED = (
    Refused(lora("PiSSA", init_lora_weights="pissa"), "initialize PiSSA under float32"),
    Refused(lora("CorDA", init_lora_weights="corda"), "initialize CorDA under float32"),
    Refused(lora("MiCA", init_lora_weights="mica"), "initialize MiCA under float32"),
    Refused(lora("orthogonal start", init_lora_weights="orthogonal"), BYTES),
    Refused(lora("BD-LoRA", use_bdlora=BdLoraConfig(target_modules_bd_a=ATTENTION, nblocks=2)), BYTES),
    Refused(lora("KaSA", kasa_config=KasaConfig()), "KaSA requires `r`"),
    Refused(lora("target_parameters", target_parameters=["q_proj.weight"], target_modules=[]), OURS),
    Refused(lora("modules_to_save of a packed layer", modules_to_save=["o_proj"]), BYTES),
    Refused(method("LN tuning of a packed layer", peft.LNTuningConfig), BYTES),
    Refused(method("LoHa", peft.LoHaConfig), OURS),
    Refused(method("LoKr", peft.LoKrConfig), OURS),
    Refused(method("HRA", peft.HRAConfig), OURS),
    Refused(method("SHiRA", peft.ShiraConfig, r=2), OURS),
    Refused(method("HiRA", peft.HiraConfig, r=4), OURS),
    Refused(method("DEFT", peft.DeftConfig, r=4), SHAPES),
    Refused(method("PEANuT", peft.PeanutConfig, r=4), OURS),
    Refused(method("Supertuning", peft.SupertuningConfig), OURS),
    Refused(method("UniLoRA", peft.UniLoraConfig, r=4), OURS),
    Refused(lora("VeLoRA", velora_config=VeloraConfig()), OURS),
    Refused(method("DeLoRA", peft.DeloraConfig), BYTES),
    Refused(method("FRoD", peft.FrodConfig, progressbar=False), BYTES),
    Refused(method("AdaMSS", peft.AdamssConfig, r=8, needs="sklearn"), BYTES),
    Refused(method("TinyLoRA", peft.TinyLoraConfig), BYTES),
    Refused(method("PSOFT", peft.PsoftConfig, r=4), BYTES),
    Refused(method("GLoRA", peft.GloraConfig, r=4), "not a plain torch.nn.Linear"),
    Refused(method("OSF", peft.OSFConfig), "effective_rank"),
)
"""Methods that compute with the weight itself, which is bytes here, or keep their factors in its dtype: an error when
PEFT wraps the model."""

NOT_TRIED = {
    "XLORA": "mixes adapters that have been trained before",
    "SHADOW": "does not run on the decoded model either",
}
"""Types of PEFT that are in none of the tables, and why."""
