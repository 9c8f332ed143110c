"""A program's own LoRA matrices and prefixes, which follow its first message, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import trio

from peerd.api.tensors.bodies import decoded, header_of
from peerd.client.training.trained import LORA_A, LORA_B, Gradients, LoraPairs, Prefixes
from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V, PROMPT, BlockModule, DeepPrompt, LoraAdapter, LoraPair
from peerd.compute.errors import AdapterError
from peerd.local.messages import LocalParameter, message_bytes, read_parameter
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.encoding.wire import RawMessage
from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

_PREFIX = (PREFIX_K, PREFIX_V)


class OwnAdapter:
    """A program's own matrices: LoRA `pairs` and `prefixes`, which act in sessions and forwards, and the deep prompts
    of sessions.
    """

    def __init__(self, pairs: LoraPairs, prefixes: Prefixes, prompts: Mapping[int, torch.Tensor]) -> None:
        self.pairs = pairs
        self.prefixes = prefixes
        self._prompts = prompts

    def for_session(self) -> LoraAdapter | None:
        """The adapter with which a session is opened; None if there is nothing in it. Raises InvalidRequest."""
        weights: dict[BlockModule, LoraPair | DeepPrompt] = {
            key: LoraPair(a, b, 1.0) for key, (a, b) in self.pairs.items()
        }
        weights |= {(block, PROMPT): DeepPrompt(values) for block, values in self._prompts.items()}
        for block, prefix in self.prefixes.items():
            weights |= {(block, name): DeepPrompt(each) for name, each in zip(_PREFIX, prefix, strict=True)}
        try:
            return LoraAdapter(weights) if weights else None
        except AdapterError as error:
            raise InvalidRequest(str(error)) from None


async def read_own_adapter(receive: trio.MemoryReceiveChannel[RawMessage], count: int) -> OwnAdapter:
    """Read the matrices from the next `count` messages. Raises InvalidRequest, RemoteProtocolError."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for _ in range(count):
        raw = await receive.receive()
        parameter = read_parameter(raw)
        found[parameter.block, parameter.name] = decoded(header_of(parameter.tensor), raw.body)
    prompts = {block: values for (block, name), values in found.items() if name == PROMPT}
    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
    prefixes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for block, name in found:
        if name == PROMPT:
            continue
        if name in _PREFIX:
            prefixes[block] = _both(found, block, name, *_PREFIX)
            continue
        module = name.removesuffix(LORA_A).removesuffix(LORA_B)
        pairs[block, module] = _both(found, block, name, module + LORA_A, module + LORA_B)
    return OwnAdapter(pairs, prefixes, prompts)


def _both(
    found: Mapping[tuple[int, str], torch.Tensor], block: int, name: str, first: str, second: str
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return found[block, first], found[block, second]
    except KeyError:
        raise InvalidRequest(f"block {block}: {name} is one of a pair, {first} and {second}") from None


def gradient_messages(gradients: Gradients) -> Iterator[bytes]:
    """A websocket message for each matrix's gradient."""
    named = [
        (block, name, gradient)
        for (block, module), pair in gradients.lora.items()
        for name, gradient in zip((module + LORA_A, module + LORA_B), pair, strict=True)
    ]
    for block, prefix in gradients.prefixes.items():
        named += [(block, name, gradient) for name, gradient in zip(_PREFIX, prefix, strict=True)]
    for block, name, gradient in named:
        header, body = encode_tensor(gradient)
        yield message_bytes(LocalParameter(block, name, header.to_fields()), body)
