"""LoRA: reads peft's files, and runs many adapters at once over one span."""
