"""Write a model as ONNX and safetensors."""
