"""Turns values into bytes and back: MessagePack, fields, messages, tensors."""
