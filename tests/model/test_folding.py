"""Folding frozen batch norms changes speed and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from vlm.config import ImageConfig
from vlm.model.folding import fold_frozen
from vlm.model.image_encoder import ImageEncoder

NETWORKS = ["resnet10t", "tf_efficientnet_lite0", "densenet121", "resnetv2_50", "convnext_atto"]


def encoder(name: str, blocks: int | None) -> ImageEncoder:
    """One with statistics that are not those of the start, in fp64."""
    torch.manual_seed(0)
    made = ImageEncoder(ImageConfig(name=name, image_size=64, batch_norm="frozen", trainable_blocks=blocks)).double()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight.data):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.running_mean, module.bias.data):
                assert tensor is not None
                tensor.normal_(0, 0.1)
    return made.train()


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def run(made: ImageEncoder, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = made(images)
    tokens.square().sum().backward()
    return tokens.detach(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_and_gradients_are_those_of_the_network_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, gradients = run(encoder(name, 1), images)
    monkeypatch.setattr(ImageEncoder, "_folded_backbone", lambda self: self.backbone)
    expected, their_gradients = run(encoder(name, 1), images)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == their_gradients.keys()
    assert gradients
    for key, gradient in gradients.items():
        # Those of the ResNetV2 reach 1e7, and its small ones are differences of such.
        largest = float(their_gradients[key].abs().max())
        torch.testing.assert_close(gradient, their_gradients[key], rtol=0, atol=1e-12 * largest)


def test_frozen_norms_are_gone_and_trained_ones_stay() -> None:
    made = encoder("tf_efficientnet_lite0", 0)
    folded = made._folded_backbone()
    assert norms(made.backbone) == 49
    assert norms(folded) == 0
    part = encoder("tf_efficientnet_lite0", 2)
    trained = {id(p) for p in part.backbone.parameters() if p.requires_grad}
    assert {id(p) for p in part._folded_backbone().parameters() if p.requires_grad} == trained
    assert 0 < norms(part._folded_backbone()) < 49


def test_the_state_does_not_know_of_it_and_loading_renews_it() -> None:
    made, other = encoder("resnet10t", 1), encoder("resnet10t", 1)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before, names = made(images), list(made.state_dict())
    assert list(other.state_dict()) == names
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in made.state_dict().items()}
    made.load_state_dict(state)
    other.load_state_dict(state)
    torch.testing.assert_close(made(images), other(images))
    assert not torch.allclose(made(images), before)


def test_a_network_that_reads_a_convolution_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            nn.init.constant_(self.norm.weight, 2.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            result: Tensor = self.norm(y) + y
            return result

    module = Twice().eval().requires_grad_(False)
    assert fold_frozen(module, torch.randn(1, 3, 8, 8)) is module
