"""Averaged weights are what their definition says, and take the model's place only where they should."""

import copy

import pytest
import torch
from torch import nn

from vlm.train.averaging import Averaging


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def walk(module: nn.Module, averaging: Averaging, steps: int) -> list[dict[str, torch.Tensor]]:
    """Changes the weights and statistics at random, `steps` times; what they were after each."""
    states = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        module(torch.randn(5, 3))
        averaging.update(module)
        states.append(copy.deepcopy(module.state_dict()))
    return states


def expected(states: list[dict[str, torch.Tensor]], decay: float, name: str) -> torch.Tensor:
    """a_0 = w_0; a_n = d_n a_(n-1) + (1 - d_n) w_n with d_n = min(decay, (1 + n) / (10 + n))."""
    average = states[0][name].double()
    for n, state in enumerate(states[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * state[name].double()
    return average


@pytest.mark.parametrize("decay", [0.2, 0.5, 0.999])
def test_the_average_is_its_definition(decay: float) -> None:
    module = model()
    averaging = Averaging(module, decay)
    states = walk(module, averaging, 12)
    averaged = averaging.best(module).state_dict()
    for name, value in averaged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected(states, decay, name), rtol=0, atol=1e-5)
        else:
            assert torch.equal(value, states[-1][name])  # batch norm counts its batches
    assert not torch.equal(averaged["0.weight"], states[-1]["0.weight"])


def test_it_goes_on_from_its_state_as_if_never_stopped() -> None:
    whole, parted = model(), model()
    one, two = Averaging(whole, 0.9), Averaging(parted, 0.9)
    torch.manual_seed(1)
    walk(whole, one, 6)
    torch.manual_seed(1)
    walk(parted, two, 3)
    resumed = Averaging(parted, 0.9)
    assert two.averaged is not None
    assert resumed.averaged is not None
    resumed.averaged.load_state_dict(two.averaged.state_dict())
    walk(parted, resumed, 3)
    for a, b in zip(one.best(whole).state_dict().values(), resumed.best(parted).state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_nothing_moves_in_a_step_that_was_not_taken() -> None:
    """Though the average is on its way to the weights."""
    module = model()
    averaging = Averaging(module, 0.9)
    walk(module, averaging, 3)
    before = copy.deepcopy(averaging.best(module).state_dict())
    assert not torch.equal(before["0.weight"], module.state_dict()["0.weight"])
    averaging.update(module, torch.tensor(False))
    after = averaging.best(module).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    walk(module, averaging, 1)
    assert not torch.equal(before["0.weight"], averaging.best(module).state_dict()["0.weight"])


def test_off_means_the_model_itself() -> None:
    module = model()
    averaging = Averaging(module, 0.0)
    averaging.update(module)
    assert averaging.best(module) is module


def test_applied_lends_the_average_and_gives_the_model_back_even_after_an_error() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()

    owner = Owner()
    mine = owner.model
    averaging = Averaging(mine, 0.9)
    with averaging.applied(owner):
        assert owner.model is averaging.best(mine) is not mine
    assert owner.model is mine
    with pytest.raises(ZeroDivisionError), averaging.applied(owner):
        raise ZeroDivisionError
    assert owner.model is mine
