"""What `make dead-code` must not report: names of ours that only others use. Vulture reads this file; nobody runs it.

A name that is in no list, and that no line of ours uses, is dead: delete it, together with its tests.
"""

# Methods and attributes that Transformers, torch, kademlia, click, hypercorn, llguidance or Python look up.
_.__class__
_.__dir__
_.__getattr__
_.__signature__
_._attn_implementation
_._check_protocol
_._is_hf_initialized
_.accesslog
_.activate_past_recording
_.base_model_name_or_path
_.batch_repeat_interleave
_.batch_select_indices
_.batch_size
_.bos_token_id
_.crop
_.default_map
_.embed_scale
_.errorlog
_.extra_repr
_.format_options
_.get_mask_sizes
_.get_conv_state
_.get_recurrent_state
_.has_previous_state
_.init_continuous_batching
_.is_recording_past
_.pre_tokenizer
_.record_past
_.update_conv_state
_.update_recurrent_state
_.get_max_length
_.get_query_offset
_.include_date_header
_.include_server_header
_.is_compileable
_.is_croppable
_.is_initialized
_.is_sliding
_.is_tokenizer_wrapper
_.keep_alive_timeout
_.layer_class_to_replicate
_.lazy_initialization
_.name_or_path
_.new_swarm
_.offloading
_.query_pre_attn_scalar
_.reorder_cache
_.same_home_as
_.special_token_ids
_.supports_early_init
_.websocket_max_message_size
# Functions: prompt_toolkit calls them for keys.
begin_line

# Arguments that such callers give by name.
families
memo
output_attentions
position_bias
trace

# For applications.
_.from_seed
_.lark
_.load_trained
_.save_adapter

# Commands: click finds them.
calibrate

# Keys of the terminal chat: prompt_toolkit calls them.
begin_line

# For tests and benchmarks: what they start, break, look at and compare with.
FakeEngine
HostilePeer
conversations
hello_message
mutated
_.be_entered
_.disconnect
_.give_up
_.heal
_.put_behind_nat
_.set_latency
_.start_again
_.wait_done
_.wait_lost
_.bytes_per_token
_.handshake_hash
_.padding_idx
_.lanes
_.learned
_.used_pages
before_newest_tested
load_head
swarm_flow
whole_pass

# Tables of the specification: which messages each side may send.
PASS_FROM_CLIENT
PASS_FROM_HOP
PROGRESS_FROM_CLIENT
SPAN_FROM_CLIENT
SPAN_FROM_PEER
