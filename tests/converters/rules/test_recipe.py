"""Recipes: ordered rules over module paths, the default table, and weights that are fused and decided together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qformat.artifact.tensor_spec import TensorSpec
from qformat.converters.rules.recipe import Choice, NF4Options, Recipe, Rule, apply, load_recipe
from qformat.converters.rules.rules import KeepReason, default_decisions
from qformat.converters.rules.skip_list import skip_modules
from qformat.errors import UsageError

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}
LEAVES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def matrix(name: str) -> TensorSpec:
    return TensorSpec(name, "BF16", (64, 128))


TENSORS = [
    *(matrix("model.embed_tokens.weight"), matrix("lm_head.weight"), matrix("model.layers.0.mystery.weight")),
    *(matrix(f"model.layers.{layer}.{leaf}.weight") for layer in (0, 1, 10) for leaf in LEAVES),
    *(TensorSpec(f"model.layers.{layer}.input_layernorm.weight", "BF16", (128,)) for layer in (0, 1, 10)),
    *(matrix("model.layers.1.mlp.experts.0.up_proj.weight"), matrix("model.layers.1.mlp.gate.weight")),
]


def recipe(*rules: Rule, block_size: int = 64, double_quant: bool = True) -> Recipe:
    return Recipe(NF4Options(block_size, double_quant), rules)


def choose(*rules: Rule) -> dict[str, Choice]:
    return apply(recipe(*rules), TENSORS, CONFIG)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def rule_text(body: str) -> str:
    return f"[[rule]]\n{body}\n"


def modules(choices: dict[str, Choice], reason: KeepReason | None) -> set[str]:
    return {name.removesuffix(".weight") for name, choice in choices.items() if choice.reason == reason}


def test_without_rules_the_default_table_decides() -> None:
    choices = choose()
    for name, decision in default_decisions(TENSORS, CONFIG).items():
        expected = NF4Options() if decision.quantize else None
        assert choices[name] == Choice(expected, decision.reason, decision.is_linear, None)


def test_the_default_options_reach_every_tensor_that_no_rule_matches() -> None:
    choices = apply(recipe(block_size=128, double_quant=False), TENSORS, CONFIG)
    assert {choice.options for choice in choices.values()} == {None, NF4Options(128, False)}


def test_a_keep_rule_keeps_what_it_matches_and_is_recorded_as_the_deciding_rule() -> None:
    choices = choose(Rule("model.layers.0.*", "keep"))
    kept = modules(choices, KeepReason.SKIPPED_BY_RECIPE)
    assert kept == {f"model.layers.0.{leaf}" for leaf in LEAVES}
    assert {choices[f"{name}.weight"].by_rule for name in kept} == {0}


def test_a_star_matches_dots_and_a_layer_number_matches_completely() -> None:
    choices = choose(Rule("model.layers.1.*_proj", "keep"))
    kept = modules(choices, KeepReason.SKIPPED_BY_RECIPE)
    assert kept == {f"model.layers.1.{leaf}" for leaf in LEAVES}


def test_a_pattern_must_match_the_whole_module_path_without_weight() -> None:
    with pytest.raises(UsageError, match="matches no tensor"):
        choose(Rule("layers.0.mlp", "keep"))
    with pytest.raises(UsageError, match="matches no tensor"):
        choose(Rule("model.layers.0.mlp.down_proj.weight", "keep"))
    assert modules(choose(Rule("*.0.mlp.down_proj", "keep")), KeepReason.SKIPPED_BY_RECIPE)


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(UsageError, match="matches no tensor"):
        choose(Rule("MODEL.*", "keep"))


def test_the_first_matching_rule_wins() -> None:
    choices = choose(Rule("*.0.mlp.*", "nf4", block_size=32), Rule("*.mlp.*", "keep"))
    assert choices["model.layers.0.mlp.up_proj.weight"] == Choice(NF4Options(32, True), None, True, 0)
    assert choices["model.layers.1.mlp.up_proj.weight"].by_rule == 1


def test_an_nf4_rule_sets_its_options_and_leaves_the_others() -> None:
    rules = Rule("*.o_proj", "nf4", double_quant=False), Rule("*.down_proj", "nf4", block_size=256)
    choices = apply(recipe(*rules, block_size=128), TENSORS, CONFIG)
    assert choices["model.layers.0.self_attn.o_proj.weight"].options == NF4Options(128, False)
    assert choices["model.layers.0.mlp.down_proj.weight"].options == NF4Options(256, True)
    assert choices["model.layers.0.mlp.up_proj.weight"].options == NF4Options(128, True)


def test_the_user_may_vouch_for_a_weight_that_the_table_does_not_know() -> None:
    name = "model.layers.0.mystery.weight"
    assert not choose()[name].quantize
    assert choose(Rule("*.mystery", "nf4"))[name] == Choice(NF4Options(), None, True, 0, vouched=True)


def test_only_a_weight_that_the_table_does_not_know_is_marked_as_vouched_for() -> None:
    vouched = {name for name, choice in choose(Rule("*", "nf4")).items() if choice.vouched}
    assert vouched == {"model.layers.0.mystery.weight"}


def test_a_broad_nf4_rule_leaves_embeddings_experts_routers_and_norms_alone() -> None:
    choices = choose(Rule("*", "nf4", block_size=128))
    default = default_decisions(TENSORS, CONFIG)
    for name in (
        *("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"),
        *("model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.gate.weight"),
    ):
        assert choices[name] == Choice(None, default[name].reason, default[name].is_linear, None)


@pytest.mark.parametrize(
    ("pattern", "phrase"),
    [
        ("lm_head", "output embedding"),
        ("model.embed_tokens", "embedding"),
        ("*.experts.*", "expert matrix"),
        ("*layernorm", "not a matrix"),
        ("*.mlp.gate", "router"),
    ],
)
def test_an_nf4_rule_that_matches_nothing_quantizable_is_an_error(pattern: str, phrase: str) -> None:
    with pytest.raises(UsageError, match=f"no tensor that can be quantized .*{phrase}"):
        choose(Rule(pattern, "nf4"))


def test_a_keep_rule_may_match_only_what_is_kept_anyway() -> None:
    assert choose(Rule("lm_head", "keep")) == choose()


def test_the_error_for_a_pattern_without_matches_lists_the_nearest_modules() -> None:
    with pytest.raises(UsageError) as error:
        choose(Rule("model.layers.0.mlp.upproj", "keep", origin="r.toml: rule 3"))
    assert str(error.value).startswith("r.toml: rule 3: the pattern 'model.layers.0.mlp.upproj' matches no tensor")
    assert "Nearest: model.layers.0.mlp.up_proj" in str(error.value)


def test_the_nearest_modules_are_listed_once_for_all_layers() -> None:
    with pytest.raises(UsageError) as error:
        choose(Rule("model.layers.99.mlp.up_proj", "keep"))
    assert str(error.value).count("mlp.up_proj") == 2  # the pattern and one of three layers


def test_a_keep_rule_extends_to_the_weights_that_vllm_fuses() -> None:
    choices = choose(Rule("*.1.*.k_proj", "keep"), Rule("*.10.mlp.up_proj", "keep"))
    coupled = {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.10.mlp.gate_proj",
    }
    assert modules(choices, KeepReason.COUPLED) == coupled
    assert {choices[f"{name}.weight"].by_rule for name in coupled} == {None}


def test_keep_extends_to_a_fused_weight_that_another_rule_quantizes() -> None:
    choices = choose(Rule("*.k_proj", "keep"), Rule("*.q_proj", "nf4", block_size=32))
    assert choices["model.layers.0.self_attn.q_proj.weight"].reason == KeepReason.COUPLED


@pytest.mark.parametrize("options", [{"block_size": 128}, {"double_quant": False}])
def test_fused_weights_with_different_options_are_an_error_that_lists_them(options: dict[str, int]) -> None:
    with pytest.raises(UsageError) as error:
        choose(Rule("*.0.self_attn.q_proj", "nf4", **options, origin="r.toml: rule 1"))  # type: ignore[arg-type]
    message = str(error.value)
    assert "model.layers.0.self_attn.qkv_proj" in message
    assert "model.layers.0.self_attn.k_proj: block_size 64, double_quant true (by default)" in message
    assert "(by r.toml: rule 1)" in message


def test_fused_weights_may_share_options_that_differ_from_other_weights() -> None:
    choices = choose(Rule("*.self_attn.[qkv]_proj", "nf4", block_size=32))
    sizes = {name: choice.options.block_size for name, choice in choices.items() if choice.options is not None}
    assert sizes["model.layers.0.self_attn.v_proj.weight"] == 32
    assert sizes["model.layers.0.self_attn.o_proj.weight"] == 64


def test_the_skip_list_follows_the_recipe() -> None:
    choices = choose(Rule("*.0.self_attn.k_proj", "keep"), Rule("*.mystery", "nf4"))
    assert skip_modules(choices, CONFIG) == [
        "lm_head",
        *(f"model.layers.0.self_attn.{leaf}" for leaf in ("k_proj", "q_proj", "qkv_proj", "v_proj")),
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.gate",
    ]


def test_a_recipe_file_is_read_in_order(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        rule_text('pattern = "model.layers.0.*"\naction = "keep"')
        + rule_text('pattern = "*.mlp.*"\naction = "nf4"\nblock_size = 128\ndouble_quant = false'),
    )
    assert load_recipe(path).rules == (
        Rule("model.layers.0.*", "keep"),
        Rule("*.mlp.*", "nf4", 128, False),
    )


def test_no_file_and_no_skip_is_an_empty_recipe() -> None:
    assert load_recipe(None) == Recipe(NF4Options(), ())


def test_an_empty_file_is_an_empty_recipe(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "# nothing\n")) == Recipe(NF4Options(), ())


def test_skip_patterns_take_precedence_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, rule_text('pattern = "*"\naction = "nf4"'))
    loaded = load_recipe(path, skip=["*.o_proj", "*.0.*"])
    assert loaded.rules == (Rule("*.o_proj", "keep"), Rule("*.0.*", "keep"), Rule("*", "nf4"))
    assert [str(rule.origin) for rule in loaded.rules] == [
        "skip=('*.o_proj',)",
        "skip=('*.0.*',)",
        f"{path}: rule 1",
    ]


def test_a_skip_pattern_without_matches_is_reported_as_the_user_wrote_it() -> None:
    with pytest.raises(UsageError, match=r"^skip=\('\*.nothing',\): the pattern"):
        apply(load_recipe(None, skip=["*.nothing"]), TENSORS, CONFIG)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('action = "keep"', "pattern must be a glob"),
        ('pattern = ""\naction = "keep"', "pattern must be a glob"),
        ('pattern = 3\naction = "keep"', "pattern must be a glob"),
        ('pattern = "*"', 'action must be "nf4" or "keep", got None'),
        ('pattern = "*"\naction = "fp4"', "got 'fp4'"),
        ('pattern = "*"\naction = ["nf4"]', 'action must be "nf4" or "keep"'),
        (
            'pattern = "*"\naction = "nf4"\nblock_size = 48',
            "block_size must be one of 32, 64, 128, 256, got 48",
        ),
        ('pattern = "*"\naction = "nf4"\nblock_size = 0', "block_size must be one of"),
        ('pattern = "*"\naction = "nf4"\nblock_size = 64.0', "block_size must be one of"),
        ('pattern = "*"\naction = "nf4"\nblock_size = true', "block_size must be one of"),
        ('pattern = "*"\naction = "nf4"\nblock_size = "64"', "block_size must be one of"),
        ('pattern = "*"\naction = "nf4"\ndouble_quant = 1', "double_quant must be true or false, got 1"),
        ('pattern = "*"\naction = "keep"\nblock_size = 64', "block_size has no effect"),
        ('pattern = "*"\naction = "keep"\ndouble_quant = true', "double_quant has no effect"),
        ('pattern = "*"\naction = "nf4"\nblocksize = 64', "unknown key 'blocksize'"),
    ],
)
def test_an_invalid_rule_is_reported_with_file_and_number(tmp_path: Path, body: str, problem: str) -> None:
    path = written(tmp_path, rule_text('pattern = "*"\naction = "keep"') + rule_text(body))
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: rule 2")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("block_size = 64\n", "unknown key 'block_size'"),
        ('[rule]\npattern = "*"\n', "Write [[rule]], not [rule]"),
        ('rule = ["*"]\n', "must be a table"),
        ("[[rule]\n", "is not valid TOML"),
        ('[[rule]]\npattern = "*"\npattern = "x"\n', "is not valid TOML"),
        ("a = " + "[" * 5000 + "]" * 5000 + "\n", "is not valid TOML"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_rejected(tmp_path: Path, text: str, problem: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)


def test_a_recipe_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"# \xff\n")
    with pytest.raises(UsageError, match="is not valid TOML"):
        load_recipe(path)


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the recipe: No such file"):
        load_recipe(tmp_path / "missing.toml")
    with pytest.raises(UsageError, match="cannot read the recipe: it is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("block_size", [0, 16, 63, 512, True])
def test_a_wrong_default_block_size_is_a_usage_error(block_size: int) -> None:
    with pytest.raises(UsageError, match=r"^block_size must be one of"):
        load_recipe(None, block_size=block_size)


def test_an_empty_skip_pattern_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"^skip must be a glob"):
        load_recipe(None, skip=[""])


def test_the_canonical_form_is_plain_json_with_only_the_options_that_were_set() -> None:
    canonical = recipe(Rule("a", "keep", origin="x"), Rule("b", "nf4", 32, False), Rule("c", "nf4")).canonical()
    assert json.loads(json.dumps(canonical)) == {
        "defaults": {"block_size": 64, "double_quant": True},
        "rules": [
            {"pattern": "a", "action": "keep"},
            {"pattern": "b", "action": "nf4", "block_size": 32, "double_quant": False},
            {"pattern": "c", "action": "nf4"},
        ],
    }


def test_the_origin_of_a_rule_is_not_part_of_the_recipe() -> None:
    assert Rule("a", "keep", origin="x") == Rule("a", "keep", origin="y")
    assert "origin" not in json.dumps(recipe(Rule("a", "keep", origin="x")).canonical())


def test_keeping_a_tensor_by_name_takes_the_name_literally() -> None:
    tensors = [matrix("a[0].q_proj.weight"), matrix("a0.q_proj.weight")]
    choices = apply(recipe().keeping(["a[0].q_proj.weight"]), tensors, CONFIG)
    assert [choice.quantize for choice in choices.values()] == [False, True]
