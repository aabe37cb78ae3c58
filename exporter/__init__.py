"""Checkpoint to bundle: the model traced once as dynamic ONNX graphs over one weights file."""
