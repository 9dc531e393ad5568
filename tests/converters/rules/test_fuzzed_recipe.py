"""Any recipe file is read, or refused with an error that names it."""

from __future__ import annotations

from pathlib import Path
from random import Random

from qformat.converters.rules.recipe import Recipe, load_recipe
from qformat.errors import QformatError
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths

VALUES = [
    '"nf4"', '"keep"', '"model.layers.*"', '"["', '""', "32", "64", "0", "-1", "9" * 50, "1e400", "nan", "true",
    "[]", "[[1]]", "{}", '{a = "b"}', "1979-05-27", "07:32:00", "'''x'''", '"\\u0000"', "0x40",
]  # fmt: skip
KEYS = ["pattern", "action", "block_size", "double_quant", "more", '""', '"a.b"', "rule", "action.x"]


def recipe_text(random: Random) -> bytes:
    """Return rules with keys and values that fit or not, and a few changed bytes."""
    lines = []
    for _ in range(random.randint(0, 3)):
        lines.append(random.choice(["[[rule]]", "[[rule]]", "[[rule]]", "[rule]", "rule = 3", "[[rule.x]]", ""]))
        lines += ['pattern = "model.layers.0.*"', 'action = "nf4"'] * (random.random() < 0.7)
        lines += [f"{random.choice(KEYS)} = {random.choice(VALUES)}" for _ in range(random.randint(0, 2))]
    return edited_bytes(random, "\n".join(lines).encode())


@lengths(200, 15_000)
def test_any_recipe_is_read_or_refused_with_its_name(n_examples: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"

    def check(random: Random) -> None:
        path.write_bytes(recipe_text(random))
        try:
            assert isinstance(load_recipe(path), Recipe)
        except QformatError as error:
            assert "recipe.toml" in str(error)

    fuzz(n_examples, check, RANDOM)
