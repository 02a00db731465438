"""Hugging Face checkpoints to neutral ONNX graphs. The only part of edgecomp that imports torch."""
