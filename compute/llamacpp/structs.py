"""The structures of llama.h that we pass to llama.cpp, as ctypes lays them out, and the check that they fit a library.

llama.h promises no stable layout: a release may insert a field anywhere. So a library is used only if the default
parameters that it returns are the known ones, field by field. A field that was inserted, removed or moved shifts its
neighbours, and nearly all of these have defaults that differ from those around them. Each structure ends in spare
bytes: a library whose structure is longer writes into those, and reads zeros from them, which mean "as before" for
nearly every field that llama.cpp ever added.

Source: include/llama.h of llama.cpp, build 11549.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import (
    CFUNCTYPE,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, TypeVar

#: bool (tensor, ask, user data): whether a node's result is wanted, and, once it is computed, whether to go on.
EvalCallback = CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
#: void (level, text, user data)
LogCallback = CFUNCTYPE(None, c_int, c_char_p, c_void_p)

#: `enum llama_load_mode`: read the file into memory instead of mapping it.
LOAD_INTO_MEMORY = 0
#: `enum llama_flash_attn_type`
FLASH_ATTENTION = 1
#: `LLAMA_MAX_SEQ`: sequences of one context.
MAX_SEQUENCES = 256

_Spare = c_uint64 * 16
_SPARE = [("spare", _Spare)]


class ModelParams(Structure):
    """`struct llama_model_params`"""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        *_SPARE,
    ]


class ContextParams(Structure):
    """`struct llama_context_params`"""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", EvalCallback),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        *_SPARE,
    ]


class Batch(Structure):
    """`struct llama_batch`"""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


Params = TypeVar("Params", ModelParams, ContextParams)


def with_values(defaults: Params, **values: Any) -> Params:
    """Parameters with these values, and zeros in the spare bytes, which ctypes leaves as the stack was."""
    for name, value in {**values, "spare": _Spare()}.items():
        setattr(defaults, name, value)
    return defaults


#: What llama.cpp's defaults are. A field that is left out has a default that depends on the machine or the build.
MODEL_DEFAULTS: Mapping[str, Any] = {
    "devices": None,
    "tensor_buft_overrides": None,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "progress_callback": None,
    "progress_callback_user_data": None,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
CONTEXT_DEFAULTS: Mapping[str, Any] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval_user_data": None,
    "type_k": 1,
    "type_v": 1,
    "moe_cache_size": 0,
    "abort_callback": None,
    "abort_callback_data": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}


def differences(found: Structure, expected: Mapping[str, Any]) -> list[str]:
    """The fields of default parameters that are not what they were when the layout was written down."""
    return [name for name, value in expected.items() if getattr(found, name) != value]
