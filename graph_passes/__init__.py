"""ONNX to ONNX: find the decoder, select, splice, specialise, lower for a target, expose, lint."""
