"""Where weights come from: safetensors, digests, tokenizer."""
