"""The code in the guide to the Transformers model runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

GUIDE = Path(__file__).parents[4] / "docs/transformers.md"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)

pytestmark = [
    pytest.mark.real_time,
    # huggingface_hub 2.4 uploads by an old argument of its HTTP client.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # Of peft and Transformers among themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_the_guide_runs_from_top_to_bottom(
    servers: Any, hub: Any, byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    # The model of the tests has no tokenizer on the hub.
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: byte_tokenizer)
    names: dict[str, Any] = {"ADDRESS": servers.bootstrap[0]}
    blocks = BLOCK.findall(GUIDE.read_text())
    assert len(blocks) == 8
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert names["turn"].shape[1] > names["answer"].shape[1]
    assert names["logits"].shape == (1, 9, 260)
    assert torch.isfinite(names["loss"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(
        hub.repos["me/my-adapter"].commits[hub.repos["me/my-adapter"].refs["main"]]
    )
