"""What torch.compile needs beside PyTorch."""

import torch

from vlm.errors import ConfigError


def need_compiler(device: torch.device) -> None:
    """Looks before something is compiled for `device`, as torch's own error comes at the first step, with a page of its calls.

    Raises:
        ConfigError: there is no C++ compiler (for a CPU), or no Triton (for a GPU).
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError("torch.compile needs Triton for this GPU; pip install triton, or leave compiling out.")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "torch.compile needs a C++ compiler, and none is found; install g++, or name one in the environment variable CXX, or leave compiling out."
        ) from None
