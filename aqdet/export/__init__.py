"""Export of a trained detector: integer program, integer reference, ONNX, packed weights, proofs and reports."""
