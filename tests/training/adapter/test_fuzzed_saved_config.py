"""Any adapter_config.json is read, or refused with an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from peft import LoraConfig

from qformat.errors import AdapterError
from qformat.names import ADAPTER_CONFIG_NAME
from qformat.training.adapter.saved_config import read_saved_config
from tests.corpus.damage.odd_json import odd_edit, odd_text, set_json
from tests.corpus.damage.trainings import CONFIG_VALUES
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths


@lengths(100, 8_000)
def test_any_adapter_config_is_read_or_refused_with_its_name(n_examples: int, tmp_path: Path) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"v_proj": 2}).save_pretrained(tmp_path)
    path = tmp_path / ADAPTER_CONFIG_NAME
    whole = path.read_text("utf-8")

    def check(random: Random) -> None:
        path.write_text(whole, "utf-8")
        name, value = random.choice(CONFIG_VALUES)
        match random.randrange(4):
            case 0:
                set_json(path, (name,), value)
            case 1:
                path.write_text(odd_text(random, whole)[0], "utf-8")
            case 2:
                path.write_bytes(edited_bytes(random, whole.encode()))
            case _:
                record = json.loads(whole)
                odd_edit(random, record)
                path.write_text(json.dumps(record), "utf-8")
        try:
            assert isinstance(read_saved_config(tmp_path), LoraConfig)
        except AdapterError as error:
            assert ADAPTER_CONFIG_NAME in str(error)
            assert len(str(error)) < 2_000

    fuzz(n_examples, check, RANDOM)
