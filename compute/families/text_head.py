"""Gives an LM head to a text model that Transformers has only inside a model that also sees.

Such a model's own class needs the configuration of its vision tower. Text alone needs the decoder, the linear map after
it, and the names that these have in a causal model.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

from peerd.compute.transformers_compat import import_quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@cache
def with_lm_head(decoder_type: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A causal model class around this class of decoders: `model`, and `lm_head`, which may be tied."""
    from torch import nn
    from transformers import GenerationMixin

    outputs = import_quietly("transformers.modeling_outputs")
    # The class that the decoder shares with the model around it: it says how weights are initialised and what is split.
    family: Any = decoder_type.__mro__[1]

    class TextForCausalLM(family, GenerationMixin):  # type: ignore[misc]  # a base that is known only now
        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as Transformers has it

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = decoder_type(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            position_ids: Any = None,
            inputs_embeds: Any = None,
            labels: Any = None,
            **kwargs: Any,
        ) -> Any:
            """The logits of all positions, and the loss if there are labels."""
            decoded = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
            logits = self.lm_head(decoded.last_hidden_state)
            loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
            return outputs.CausalLMOutputWithPast(
                loss=loss,
                logits=logits,
                hidden_states=getattr(decoded, "hidden_states", None),
                attentions=getattr(decoded, "attentions", None),
            )

    # `generate` reads the names of the arguments; that of the KV cache depends on the release of Transformers.
    forward: Any = TextForCausalLM.forward
    forward.__signature__ = inspect.signature(decoder_type.forward)
    TextForCausalLM.__name__ = decoder_type.__name__.replace("Model", "ForCausalLM")
    made: type[PreTrainedModel] = TextForCausalLM
    return made
