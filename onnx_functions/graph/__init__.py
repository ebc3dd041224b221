"""What is in an ONNX graph: linears, attentions, branches, sizes, external data."""
