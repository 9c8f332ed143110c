"""How values become bytes: MessagePack, fields, messages, tensors."""
