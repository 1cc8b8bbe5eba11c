"""How far below the heads parameters stand: timm's own grouping for ViTs, ELECTRA's and BEiT's count for the text."""

from collections.abc import Callable

import pytest
from timm.optim import param_groups_layer_decay

from vlm.config import ModelConfig
from vlm.model.depth import depths
from vlm.model.vision_language import VisionLanguageModel

MakeConfig = Callable[..., ModelConfig]


def test_a_vit_s_blocks_decay_as_timm_s(tiny_config: MakeConfig) -> None:
    """timm gives the last block the heads' rate; BEiT, whose backbone has heads of its own above, does not, and nor do we."""
    model = VisionLanguageModel(tiny_config())
    backbone = model.image_encoder.backbone
    names = {id(p): name for name, p in backbone.named_parameters()}
    theirs = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(backbone, layer_decay=0.5)
        for p in group["params"]
    }
    found = depths(model)
    assert theirs.keys() == {name.removeprefix("image_encoder.backbone.") for name in found if "backbone" in name}
    for name, scale in theirs.items():
        assert 0.5 ** (found[f"image_encoder.backbone.{name}"] - 1) == pytest.approx(scale), name


def test_text_layers_and_their_memory_stand_together(tiny_config: MakeConfig) -> None:
    separate = {"decoder": "separate", "decoder_layers": 2}
    model = VisionLanguageModel(tiny_config(text={"cross_attention": (2, 3)}, fusion="late", **separate))
    found = depths(model)
    assert {name: depth for name, depth in found.items() if name.endswith(("query.weight", "word.weight"))} == {
        "text.embeddings.word.weight": 5,
        "text.layers.0.self_attention.query.weight": 4,
        "text.layers.1.self_attention.query.weight": 3,
        "text.layers.2.self_attention.query.weight": 2,
        "text.layers.2.cross_attention.query.weight": 2,
        "text.layers.3.self_attention.query.weight": 1,
        "text.layers.3.cross_attention.query.weight": 1,
        "decoder.embeddings.word.weight": 3,
        "decoder.layers.0.self_attention.query.weight": 2,
        "decoder.layers.0.cross_attention.query.weight": 2,
        "decoder.layers.1.self_attention.query.weight": 1,
        "decoder.layers.1.cross_attention.query.weight": 1,
    }
    memory = {name: depth for name, depth in found.items() if "memory" in name and name.endswith("weight")}
    assert memory == {f"fusion_memory.{what}.{i}.weight": 2 - i for what in ("keys", "values") for i in (0, 1)} | {
        f"decoder_memory.{what}.{i}.weight": 2 - i for what in ("keys", "values") for i in (0, 1)
    }
    heads = {name.split(".")[0] for name, _ in model.named_parameters() if name not in found}
    assert heads == {
        *("image_projection", "text_projection", "temperature"),
        *("matching_head", "masked_language_head", "language_head"),
    }


@pytest.mark.parametrize(
    ("image", "stages", "stem"), [("test_resnet", 4, "conv1.0"), ("test_efficientnet", 5, "conv_stem")]
)
def test_stages_of_a_convolutional_network(tiny_config: MakeConfig, image: str, stages: int, stem: str) -> None:
    model = VisionLanguageModel(tiny_config(image=image))
    backbone = {name: depth for name, depth in depths(model).items() if "backbone" in name}
    assert len(backbone) == len(list(model.image_encoder.backbone.parameters()))
    assert set(backbone.values()) == set(range(1, stages + 2)), "and the stem"
    assert backbone[f"image_encoder.backbone.{stem}.weight"] == stages + 1
    assert "image_encoder.positions" not in depths(model)
