"""Checks the arguments of a forward before anything is computed. Each error names the argument and the fix.

An error costs only the call: the model, and a cache that was passed, do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def check_inputs(given: Mapping[str, Any], *, vocabulary: int, past: int, model: str) -> None:
    """Raise ValueError for arguments of a decoder's forward with which servers cannot compute.

    past: the number of columns of the passed cache. model: the model's name, for the message.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None:
        check_ids(ids, vocabulary, model)
    if embeds is not None and embeds.dim() != 3:
        raise ValueError(f"inputs_embeds are [rows, columns, width], not {list(embeds.shape)}")
    inputs = ids if ids is not None else embeds
    if inputs is not None:
        rows, columns = inputs.shape[:2]
        if not rows or not columns:
            raise ValueError(f"{rows} rows of {columns} positions: give at least one of each")
        _check_mask(given.get("attention_mask"), rows, columns, past)
        _check_positions(given.get("position_ids"), rows, columns)
    if given.get("output_attentions"):
        raise ValueError("output_attentions: attention weights stay on the servers; leave it out")


def check_ids(ids: torch.Tensor, vocabulary: int, model: str) -> None:
    """Raise ValueError for values that are not token ids of the model. On a GPU, a wrong id would end the whole
    process.
    """
    if ids.dim() != 2:
        raise ValueError(f"input_ids are [rows, columns], not {list(ids.shape)}: give a single row as input_ids[None]")
    if ids.is_floating_point() or ids.dtype is torch.bool:
        raise ValueError(f"input_ids are whole numbers, not {ids.dtype}: did you mean inputs_embeds, or the mask?")
    if not ids.numel():
        return
    least, most = (int(value) for value in torch.aminmax(ids))
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(
            f"token {wrong} is none of the model's, 0 to {vocabulary - 1}: the tokenizer belongs to another model, or"
            f" these are labels; use {_tokenizer_of(model)}"
        )


def _tokenizer_of(model: str) -> str:
    """The call that opens the tokenizer of a model that is named as for `from_pretrained`."""
    folder, _, file = model.rpartition("/")
    if file.lower().endswith(".gguf"):
        return f"AutoTokenizer.from_pretrained({folder or '.'!r}, gguf_file={file!r})"
    if ":" in file:
        return f"the tokenizer of {model}: AutoTokenizer.from_pretrained takes a GGUF file's name as gguf_file"
    return f"AutoTokenizer.from_pretrained({model!r})"


def check_slice_mask(mask: torch.Tensor | None, hidden: torch.Tensor) -> None:
    """Raise ValueError unless the mask of a slice of blocks is `[rows, columns]`, as its hidden states."""
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(f"attention_mask of {list(mask.shape)} for hidden states of {list(hidden.shape[:2])} columns")


def check_prefix_mask(mask: torch.Tensor | None, length: int) -> None:
    """Raise ValueError if a mask `[rows, columns]` hides some of the `length` columns with which a cache begins."""
    if mask is not None and mask.shape[1] > length and not bool(mask[:, :length].all()):
        raise ValueError(
            f"an attention_mask that hides some of the cache's {length} positions: a cache with which a text begins"
            " holds no padding"
        )


def _check_mask(mask: Any, rows: int, columns: int, past: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            "remote blocks take an attention_mask of [rows, columns], 1 where a token is real: pass that one"
        )
    if mask.shape[0] not in (1, rows) or mask.shape[1] not in (columns, past + columns):
        wanted = f"[{rows}, {past + columns}]" + (f", of which {past} are in the cache" if past else "")
        raise ValueError(f"an attention_mask of {list(mask.shape)}: here it is {wanted}")


def _check_positions(positions: Any, rows: int, columns: int) -> None:
    if positions is None:
        return
    if positions.dim() != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != columns:
        raise ValueError(
            f"position_ids of {list(positions.shape)}: here they are [{rows}, {columns}], or leave them out"
        )
    if positions.is_floating_point():
        raise ValueError(f"position_ids are whole numbers, not {positions.dtype}")
