"""A peer that serves or uses a language model split over a swarm.

The names that applications use are listed here and imported on first use: `import peerd` loads neither torch nor
transformers, so the command line answers at once and a bootstrap peer stays small.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peerd.client.blocks import ServedBlocks
    from peerd.client.finding.finder import Patience
    from peerd.client.finding.served_by import ServedBy
    from peerd.client.generation import Generation, Token
    from peerd.client.grammars.grammar import Grammar
    from peerd.client.model import SwarmModel
    from peerd.client.sampling import SamplingParams
    from peerd.client.session.session import Session
    from peerd.client.training.trained import Gradients
    from peerd.client.training.training_pass import Pass
    from peerd.compute.adapters.lora import DeepPrompt, LoraAdapter, LoraPair
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.compute.checkpoint.hub.settings import HubSettings, Transfer
    from peerd.compute.errors import AdapterError, CheckpointError
    from peerd.facade.auto import AutoModelForCausalLM, RemoteConfig
    from peerd.facade.model import (
        RemoteModel,
        RemoteModelForCausalLM,
        RemoteModelForSequenceClassification,
    )
    from peerd.net.dial_policy import DialPolicy
    from peerd.net.transport import MessageChannel, Transport
    from peerd.peer import Peer, open_peer
    from peerd.protocol.addresses import Multiaddr
    from peerd.protocol.connection.liveness import Delivery
    from peerd.protocol.errors import (
        CallerError,
        ContextTooLong,
        InvalidRequest,
        LinkFailed,
        NoChain,
        NoRoom,
        Overloaded,
        PeerdError,
        PeerFault,
    )
    from peerd.protocol.identity import Identity, PeerId
    from peerd.protocol.rows import Drop, Fork, RowSlice
    from peerd.protocol.span import Span
    from peerd.reach.relay_ledger import RelayLimits
    from peerd.routing.chains.rules import ChainRules, Manifest
    from peerd.server.served_spans import ServedSpan
    from peerd.spans.spec import ServeSpec, Trainable

    __version__: str

__all__ = [
    "open_peer",
    "Peer",
    "Transport",
    "DialPolicy",
    "MessageChannel",
    "Delivery",
    "ServeSpec",
    "Trainable",
    "ServedSpan",
    "RelayLimits",
    "HubSettings",
    "Transfer",
    "Checkpoint",
    "SwarmModel",
    "ServedBlocks",
    "ChainRules",
    "Manifest",
    "Patience",
    "SamplingParams",
    "Grammar",
    "RemoteModel",
    "RemoteModelForCausalLM",
    "RemoteModelForSequenceClassification",
    "AutoModelForCausalLM",
    "RemoteConfig",
    "Generation",
    "Token",
    "ServedBy",
    "Session",
    "RowSlice",
    "Fork",
    "Drop",
    "Pass",
    "Gradients",
    "Identity",
    "PeerId",
    "Multiaddr",
    "Span",
    "PeerdError",
    "NoChain",
    "Overloaded",
    "NoRoom",
    "PeerFault",
    "LinkFailed",
    "CallerError",
    "InvalidRequest",
    "ContextTooLong",
    "CheckpointError",
    "LoraAdapter",
    "LoraPair",
    "DeepPrompt",
    "AdapterError",
    "__version__",
]

_MODULE_OF = {
    "open_peer": "peerd.peer",
    "Peer": "peerd.peer",
    "ServeSpec": "peerd.spans.spec",
    "Trainable": "peerd.spans.spec",
    "SwarmModel": "peerd.client.model",
    "RemoteModel": "peerd.facade.model",
    "RemoteModelForCausalLM": "peerd.facade.model",
    "RemoteModelForSequenceClassification": "peerd.facade.model",
    "AutoModelForCausalLM": "peerd.facade.auto",
    "RemoteConfig": "peerd.facade.auto",
    "Generation": "peerd.client.generation",
    "Token": "peerd.client.generation",
    "ServedBy": "peerd.client.finding.served_by",
    "Session": "peerd.client.session.session",
    "Identity": "peerd.protocol.identity",
    "PeerId": "peerd.protocol.identity",
    "Multiaddr": "peerd.protocol.addresses",
    "Span": "peerd.protocol.span",
    "CheckpointError": "peerd.compute.errors",
    "HubSettings": "peerd.compute.checkpoint.hub.settings",
    "AdapterError": "peerd.compute.errors",
    "LoraAdapter": "peerd.compute.adapters.lora",
    "LoraPair": "peerd.compute.adapters.lora",
    "DeepPrompt": "peerd.compute.adapters.lora",
    "SamplingParams": "peerd.client.sampling",
    "Grammar": "peerd.client.grammars.grammar",
    "Patience": "peerd.client.finding.finder",
    "ServedBlocks": "peerd.client.blocks",
    "Pass": "peerd.client.training.training_pass",
    "Gradients": "peerd.client.training.trained",
    "Transfer": "peerd.compute.checkpoint.hub.settings",
    "Checkpoint": "peerd.compute.checkpoint.checkpoint",
    "Transport": "peerd.net.transport",
    "DialPolicy": "peerd.net.dial_policy",
    "MessageChannel": "peerd.net.transport",
    "Delivery": "peerd.protocol.connection.liveness",
    "Drop": "peerd.protocol.rows",
    "Fork": "peerd.protocol.rows",
    "RowSlice": "peerd.protocol.rows",
    "RelayLimits": "peerd.reach.relay_ledger",
    "ChainRules": "peerd.routing.chains.rules",
    "Manifest": "peerd.routing.chains.rules",
    "ServedSpan": "peerd.server.served_spans",
}
_ERRORS = "peerd.protocol.errors"


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("peerd")
    if name not in __all__:
        raise AttributeError(f"module 'peerd' has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF.get(name, _ERRORS)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
