"""Exports LLaVA-Phi checkpoints to packages of ONNX graphs."""

__version__ = "0.1.0"
