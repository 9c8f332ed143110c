"""What both ends of a session share: steps kept and cut, tensors in parts, adapters, refusals."""
