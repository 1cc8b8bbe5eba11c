"""Frozen batch norm folded into the convolutions before it: the same numbers with fewer passes over memory.

In evaluation mode batch norm is a fixed scale and shift of each channel, which a convolution can carry in its weights (Jacob et al. 2018, 3.2).
With the memory kept (vlm/memory.py) a captioning step on two CPU cores is 1.2 times as fast (benchmarks/cpu_training.py).
"""

import copy
from collections import Counter

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_frozen(backbone: nn.Module, example: Tensor) -> nn.Module:
    """`backbone` with its frozen convolutions and batch norms joined, for the forward pass of training; itself where nothing can be joined.

    What is trained is shared with `backbone`, what is frozen is a copy, which does not follow later changes of the frozen weights.

    backbone: its batch norms in evaluation mode. example: normalised images (B, 3, H, W) that show how the data flows; where the result differs on
    them, because a network uses a convolution's output in some other way too, nothing is joined.
    """
    with torch.no_grad(), torch.random.fork_rng(), torch.autocast(example.device.type, enabled=False):
        pairs = _pairs(backbone, example)
        folded = _fold(backbone, pairs) if pairs else backbone
        torch.manual_seed(0)
        expected = backbone(example)
        torch.manual_seed(0)  # stochastic depth of the trained blocks draws the same
        same = torch.allclose(folded(example), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    return folded if same else backbone


def _fold(backbone: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    folded = _copy_frozen(backbone)
    for conv_name, norm_name in pairs:
        conv, norm = backbone.get_submodule(conv_name), backbone.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
        rest = [norm.drop, norm.act] if isinstance(norm, BatchNormAct2d) else []
        folded.set_submodule(norm_name, nn.Sequential(*copy.deepcopy(rest)))
    return folded


def weights_key(backbone: nn.Module) -> tuple[int, ...]:
    """Changes whenever a frozen weight or a buffer is moved or written to."""
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    return tuple(n for t in (*frozen, *backbone.buffers()) for n in (t.data_ptr(), t._version))


def _pairs(backbone: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of each frozen convolution and of the frozen batch norm that takes its output, seen in one forward pass."""
    calls: Counter[str] = Counter()
    made_by: dict[int, str] = {}
    alive: list[Tensor] = []  # else the address of an output could be used again
    found: list[tuple[str, str]] = []
    handles = []

    def after_conv(name: str, output: Tensor) -> None:
        calls[name] += 1
        made_by[id(output)] = name
        alive.append(output)

    def before_norm(name: str, given: Tensor) -> None:
        calls[name] += 1
        if id(given) in made_by:
            found.append((made_by[id(given)], name))

    for name, module in backbone.named_modules():
        if any(p.requires_grad for p in module.parameters()):
            continue
        if type(module) in (nn.Conv2d, Conv2dSame):
            handles.append(module.register_forward_hook(lambda _m, _i, out, name=name: after_conv(name, out)))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and not module.training:
            handles.append(module.register_forward_pre_hook(lambda _m, given, name=name: before_norm(name, given[0])))
    try:
        backbone(example)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in found if calls[pair[0]] == calls[pair[1]] == 1]


def _copy_frozen(backbone: nn.Module) -> nn.Module:
    """A copy that shares every trained parameter, and every module that is trained as a whole."""
    memo: dict[int, object] = {id(p): p for p in backbone.parameters() if p.requires_grad}
    for module in backbone.modules():
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            memo[id(module)] = module
    return copy.deepcopy(backbone, memo)
