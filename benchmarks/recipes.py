"""What the pretraining recipes hold and cost, computed and not measured: python benchmarks/recipes.py [RECIPE ...] [--pairs 4e6 14e6 --epochs 30]

Each recipe's task is built in full size of torch's fake tensors, which have shapes and no content, and takes a step on a few pairs, arranged as on a
GPU: one caption each, padded to 24 tokens, which is what a batch of some 64 captions comes to. Operations are counted over forward and backward by
torch.utils.flop_counter, 2 a multiply-add, attention by its definition; what the backward pass needs of a pair is what autograd saved of it under
bf16 autocast, once for 2 and once for 3 pairs. Hours are of an H200 at --mfu of its dense bf16 peak.
"""

import argparse
import json
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlm.build import Parts, build_task, image_hiding
from vlm.config import Config
from vlm.data.batch import Batch
from vlm.data.text import train_wordpiece
from vlm.model.vision_language import VisionLanguageModel
from vlm.settings import load_config
from vlm.tasks.pretraining import Pretraining
from vlm.train.cost import convolution_gradients

CONFIGS = Path(__file__).resolve().parents[1] / "configs/pretrain"
H200_PEAK = 989e12  # floating-point operations a second, dense bf16
GIB, MIB = 2**30, 2**20
PAIRS, TOKENS = (2, 3), 24


@dataclass(frozen=True)
class Cost:
    """What a process holds whatever its batch is, in bytes, and what a pair adds.

    parameters: of the model and of objectives; trained: those of them that have a gradient. weights: as saved, 4 bytes each. moments: AdamW's two.
    copies: what a step keeps whatever its batch, bf16 copies of weights (autocast's) and the queue beside this batch's keys.
    activation_bytes: saved for the backward pass, a pair.
    flops: of a pair, forward and backward, teacher included.
    """

    name: str
    image_size: int
    parameters: int
    trained: int
    weights: int
    gradients: int
    moments: int
    teacher: int
    queue: int
    copies: int
    activation_bytes: float
    flops: float

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.moments + self.teacher + self.queue + self.copies


def main() -> int:
    parser = argparse.ArgumentParser(description="What the pretraining recipes hold and cost, computed.")
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help=f"of configs/pretrain (default: all): {', '.join(known)}"
    )
    parser.add_argument(
        "--pairs", type=float, nargs="+", default=[4e6, 14e6, 129e6, 400e6], metavar="N", help="sizes of data to cost"
    )
    parser.add_argument("--epochs", type=float, metavar="N", help="over all of them (default: the recipe's)")
    parser.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="of 989 TFLOP/s (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a recipe instead of the tables")
    given = parser.parse_args()
    for name in given.recipes:
        if name not in known:
            parser.error(f"no recipe {name}; choose from {', '.join(known)}")
    costs: list[tuple[Cost, Config]] = []
    for name in given.recipes or known:
        config = published(name)
        if config.objectives.self_critical > 0:
            print(f"recipes: {name} draws captions to learn from; it is not counted", file=sys.stderr)
            continue
        costs.append((cost(name, config), config))
        print(f"recipes: {name} counted", file=sys.stderr)
        if given.json:
            found = costs[-1][0]
            told = {**vars(found), "fixed": found.fixed, "hours_a_million": hours(found.flops, 1e6, given.mfu)}
            print(json.dumps(told), flush=True)
    if given.json:
        return 0
    print_sizes([found for found, _ in costs], given.mfu)
    print_hours(costs, given.pairs, given.epochs, given.mfu)
    return 0


def print_sizes(costs: list[Cost], mfu: float) -> None:
    """A line a recipe."""
    print(
        "| recipe | image | parameters, trained (M) | weights, gradients, moments (GiB) | teacher (GiB) | queue (GiB) | copies in a step (GiB) "
        f"| activations a pair (MiB) | GFLOP a pair | H200-hours a million pairs at {mfu:.0%} |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for one in costs:
        held = (one.weights + one.gradients + one.moments) / GIB
        print(
            f"| `{one.name}` | {one.image_size} | {one.parameters / 1e6:.1f}, {one.trained / 1e6:.1f} | {held:.2f} | {one.teacher / GIB:.2f} "
            f"| {one.queue / GIB:.2f} | {one.copies / GIB:.2f} | {one.activation_bytes / MIB:.0f} | {one.flops / 1e9:.1f} "
            f"| {hours(one.flops, 1e6, mfu):.2g} |"
        )


def print_hours(costs: list[tuple[Cost, Config]], pairs: list[float], epochs: float | None, mfu: float) -> None:
    """Hours of an H200 for whole trainings."""
    named = " | ".join(f"{count / 1e6:g} M pairs" for count in pairs)
    print(f"\n| recipe, epochs | {named} |\n| --- |{' --- |' * len(pairs)}")
    for one, config in costs:
        passes = config.train.epochs if epochs is None else epochs
        cells = " | ".join(f"{hours(one.flops, count * passes, mfu):,.0f}" for count in pairs)
        print(f"| `{one.name}`, {passes:g} | {cells} |")


def hours(flops: float, pairs: float, mfu: float) -> float:
    """Of an H200 that does `mfu` of its peak."""
    return flops * pairs / (mfu * H200_PEAK) / 3600


def published(name: str) -> Config:
    """The recipe without its weights, on captions alone. Its vocabulary is that of its weights, untrimmed, or as large as one to be trained."""
    config = load_config(CONFIGS / f"{name}.yaml")
    model, text = config.model, config.model.text
    size = model.image.image_size or 224
    image = replace(model.image, pretrained=False, weights=None, image_size=size)
    if config.text_weights is None and config.init_from is None and config.tokenizer.source is None:
        text = replace(text, vocab_size=config.tokenizer.vocab_size)
    return replace(
        config,
        model=replace(model, image=image, text=text),
        data=replace(config.data, questions=False),
        objectives=replace(config.objectives, answering=0.0),
    )


def cost(name: str, config: Config) -> Cost:
    """Builds the recipe and takes steps with two numbers of pairs, so that what depends on the batch is told from what does not."""
    torch.manual_seed(0)
    with torch.device("meta"):
        tokenizer = train_wordpiece(["a red dog"], 60, min_frequency=1)
        task = build_task(config, Parts(config, tokenizer, VisionLanguageModel(config.model))).train()
    assert isinstance(task, Pretraining)
    few, more = PAIRS
    drawn = [draw(config, task, pairs) for pairs in PAIRS]
    selections = [Selections(batch) for batch in drawn]
    # As on a GPU all texts run at once. Frozen batch norms stay beside their convolutions: whether these may be joined depends on their numbers.
    texts = patch("vlm.model.lengths.reads_lengths", lambda _: False)
    norms = patch("vlm.model.image_encoder.ImageEncoder._folded_backbone", lambda self: self.backbone)
    with FakeTensorMode() as fake, texts, norms:
        unfilled(task)
        batches = [batch._map(fake.from_tensor) for batch in drawn]
        bytes_of = [saved(task, batch, selected) for batch, selected in zip(batches, selections, strict=True)]
        flops = operations(task, batches[1], selections[1]) / more
    teacher = task.teacher
    everything = {id(p): p for part in (task.model, task.learned) for p in part.parameters()}
    trained = sum(p.numel() for p in everything.values() if p.requires_grad)
    parameters = sum(p.numel() for p in everything.values())
    state = [] if teacher is None or teacher.queue is None else [*teacher.queue.buffers()]
    queue = sum(buffer.numel() * buffer.element_size() for buffer in state)
    a_pair = (bytes_of[1] - bytes_of[0]) / (more - few)
    averaged = 4 * parameters if config.train.averaging > 0 else 0
    return Cost(
        name=name,
        image_size=task.model.image_encoder.image_size,
        parameters=parameters,
        trained=trained,
        weights=4 * parameters + averaged,
        gradients=4 * trained,
        moments=8 * trained,
        teacher=0 if teacher is None else 4 * sum(p.numel() for p in teacher.model.parameters()),
        queue=queue,
        copies=max(0, round(bytes_of[0] - few * a_pair)),
        activation_bytes=a_pair,
        flops=flops,
    )


def unfilled(task: nn.Module) -> None:
    """New parameters and buffers of the same shapes, of the fake tensors of the mode that is on."""
    made: dict[int, nn.Parameter] = {}
    for module in task.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class Selections(TorchDispatchMode):
    """Lets a step without content select by a mask, whose number of true places nobody knows: here it is the predicted tokens' number."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.tokens = int(batch.texts.mask[:, 1:].sum())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.index.Tensor, aten._index_put_impl_.default, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        return func(*args, **(kwargs or {}))

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        if index is None or index.dtype != torch.bool:
            return [index]
        return [torch.empty(self.tokens, dtype=torch.long) for _ in range(index.ndim)]


def draw(config: Config, task: Pretraining, pairs: int) -> Batch:
    """As benchmarks/pretrain_step.py draws it, padded, with hidden patches where the recipe hides some."""
    from step_pair import draw_batch

    batch = draw_batch(config, pairs).lengthened(TOKENS, config.model.text.pad_id)
    hiding = image_hiding(config, task.model.image_encoder)
    if hiding is None:
        return batch
    generator = torch.Generator().manual_seed(0)
    return replace(batch, hidden=torch.stack([hiding.draw(generator) for _ in range(pairs)]))


def total(task: Pretraining, batch: Batch) -> Tensor:
    """The sum of the losses."""
    losses = task(batch)
    return torch.stack([loss.sum.float() for loss in losses.values()]).sum()


def convolution_backward(gradient: torch.Size, _: torch.Size, weight: torch.Size, *given: Any, **__: Any) -> int:
    """The count in the form in which torch's counter asks for it."""
    return convolution_gradients(gradient, weight, given[-1])


def operations(task: Pretraining, batch: Batch, selected: AbstractContextManager[Any]) -> float:
    """Floating-point operations of a step."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward})
    with selected, counter, sdpa_kernel(SDPBackend.MATH):
        total(task, batch).backward()
    return float(counter.get_total_flops())


def saved(task: Pretraining, batch: Batch, selected: AbstractContextManager[Any]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, each storage once, weights and their buffers left out."""
    own = {t.untyped_storage()._cdata for t in (*task.parameters(), *task.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with selected, hooks, torch.autocast("cpu", torch.bfloat16):
        loss = total(task, batch)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    sys.exit(main())
