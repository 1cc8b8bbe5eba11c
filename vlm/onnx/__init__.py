"""Models as ONNX graphs: written by `vlm export`, run by onnxruntime without PyTorch."""
