"""LoRA: peft's files, and many adapters at once over one span."""
