"""The .pth files of ALBEF's and BLIP's authors become our models: numbers of transformers' and timm's modules under the authors' names."""

import argparse
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
)

from vlm.build import build_parts, build_task
from vlm.cli import main
from vlm.config import Config, ModelConfig, ObjectivesConfig
from vlm.convert import convert_blip, convert_to_blip
from vlm.convert.authors import ALBEF, BLIP, convert_original
from vlm.data.shards import ShardSet
from vlm.data.text import train_wordpiece
from vlm.model.pretrained import load_metadata
from vlm.predictor import Predictor
from vlm.tasks.pretraining import Pretraining

WORDS = ("a red circle left of a blue square", "two dogs run on the green grass", "a picture of how many objects")
D, E, K, PATCHES = 64, 16, 10, 4
VISION: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 32,
    "layer_norm_eps": 1e-6,  # the authors'; transformers' BLIP has 1e-5
}
TEXT = {"hidden_size": D, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 1}
# The inverse of transformers' conversion (models/blip/convert_blip_original_pytorch_to_hf.py).
ORIGINAL = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", r"visual_encoder.blocks.\1.attn"),
    (r"^vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
)
KINDS: dict[str, Any] = {
    "captioning": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "retrieval": BlipForImageTextRetrieval,
}
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
State = dict[str, Tensor]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt, as BERT's."""
    vocab = json.loads(train_wordpiece(WORDS * 2, 200).to_json())["model"]["vocab"]
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n")
    return file


def size_of(vocabulary: Path) -> int:
    return len(vocabulary.read_text().splitlines())


def randomised(model: nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        norm = name.endswith("weight") and "norm" in name.lower()
        nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=0.1)
    return model.eval()


def blip(kind: str, vocabulary: Path, seed: int = 0) -> Any:
    """transformers' model; [DEC] and [ENC] stand behind the vocabulary."""
    size = size_of(vocabulary)
    text = {**TEXT, "vocab_size": size + 2, "bos_token_id": size, "sep_token_id": 3, "max_position_embeddings": 40}
    return randomised(KINDS[kind](BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=E)), seed)


def original(model: nn.Module) -> State:
    """Its weights under the authors' names."""
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, there in ORIGINAL:
            name = re.sub(pattern, there, name)
        state[name] = tensor.clone()
    if "itm_head.weight" in state:
        state["temp"] = torch.tensor(0.05)
    return state


def bert(vocabulary: Path, layers: int, seed: int) -> Any:
    shape = {**TEXT, "num_hidden_layers": layers, "vocab_size": size_of(vocabulary), "max_position_embeddings": 40}
    config = BertConfig(**shape, is_decoder=True, add_cross_attention=True, attn_implementation="eager")
    return randomised(BertLMHeadModel(config), seed)


class Albef:
    """ALBEF of timm's ViT and transformers' BERT layers: two read the text, two fuse it with the image."""

    def __init__(self, vocabulary: Path) -> None:
        self.vision = randomised(timm.create_model("test_vit", img_size=32, num_classes=0), 1)
        self.text, self.decoder = bert(vocabulary, 4, 2), bert(vocabulary, 2, 3)
        g = torch.Generator().manual_seed(4)
        shapes = {"vision_proj": (E, D), "text_proj": (E, D), "itm_head": (2, D)}
        self.heads = {f"{name}.weight": torch.randn(shape, generator=g) / 4 for name, shape in shapes.items()}
        self.heads |= {f"{name}.bias": torch.randn(shape[0], generator=g) for name, shape in shapes.items()}
        self.heads["temp"] = torch.tensor(0.05)

    def to(self, dtype: torch.dtype) -> "Albef":
        for part in (self.vision, self.text, self.decoder):
            part.to(dtype)
        self.heads = {name: tensor.to(dtype) for name, tensor in self.heads.items()}
        return self

    def state(self, kind: str) -> State:
        """The file of that kind: pretraining has text_encoder.bert.* and .cls.*, the others text_encoder.* alone."""
        lower = re.compile(r"bert\.encoder\.layer\.[01]\.crossattention\.")
        text = {name: tensor for name, tensor in self.text.state_dict().items() if not lower.match(name)}
        text["bert.embeddings.position_ids"] = torch.arange(40)[None]
        if kind != "pretraining":
            text = {name.removeprefix("bert."): t for name, t in text.items() if not name.startswith("cls.")}
        state = {f"visual_encoder.{name}": tensor for name, tensor in self.vision.state_dict().items()}
        state |= {f"text_encoder.{name}": tensor for name, tensor in text.items()}
        if kind == "vqa":
            state |= {f"text_decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        else:
            state |= self.heads
        return {name: tensor.clone() for name, tensor in state.items()}

    def layers(self, states: Tensor, mask: Tensor, numbers: range, image: Tensor | None = None) -> Tensor:
        hidden = (~mask)[:, None, None].to(states.dtype) * torch.finfo(states.dtype).min
        for n in numbers:
            states = self.text.bert.encoder.layer[n](states, hidden, image)
        return states

    def linear(self, name: str, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.heads[f"{name}.weight"], self.heads[f"{name}.bias"])


def file_of(state: State, folder: Path, name: str = "model.pth", **beside: Any) -> Path:
    torch.save({"model": state, "optimizer": {"lr": 0.1}, "epoch": 3, **beside}, folder / name)
    return folder / name


def converted(
    family: Any, file: Path, vocabulary: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Predictor:
    target = file.with_name(f"{file.stem}-ours")
    convert_original(family, file, target, vocabulary, **options)
    predictor = Predictor.load(target, "cpu")
    predictor.model.to(dtype)
    return predictor


def inputs(vocabulary: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised images (3, 3, 32, 32), ids and mask (3, 9)."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 6, 3])[:, None]
    ids = torch.randint(5, size_of(vocabulary), (3, 9), generator=g).masked_fill(~mask, 0)
    ids[:, 0] = 2
    return torch.randn(3, 3, 32, 32, generator=g).to(dtype), ids, mask


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def copied(state: State, queued: bool = True, seed: int = 9) -> State:
    """With momentum copies and queues as the authors' files have them."""
    g = torch.Generator().manual_seed(seed)
    parts = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
    copies = {
        name.replace(".", "_m.", 1): torch.randn(tensor.shape, generator=g)
        for name, tensor in state.items()
        if name.split(".")[0] in parts and "position_ids" not in name
    }
    for name, source in (("decoder.weight", "bert.embeddings.word_embeddings.weight"), ("decoder.bias", None)):
        if f"text_encoder_m.cls.predictions.{name}" in copies:
            twin = f"text_encoder_m.{source}" if source else "text_encoder_m.cls.predictions.bias"
            copies[f"text_encoder_m.cls.predictions.{name}"] = copies[twin]
    queue = {
        "image_queue": torch.nn.functional.normalize(torch.randn(E, K, generator=g), dim=0),
        "text_queue": torch.nn.functional.normalize(torch.randn(E, K, generator=g), dim=0),
        "queue_ptr": torch.tensor([3]),
    }
    return state | copies | (queue if queued else {})


# BLIP


@pytest.mark.parametrize("kind", KINDS)
def test_blip_is_what_transformers_folder_gives(kind: str, vocabulary: Path, tmp_path: Path) -> None:
    model = blip(kind, vocabulary)
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text(vocabulary.read_text())
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    convert_blip(folder, tmp_path / "a")
    file = file_of(copied(original(model)), tmp_path)
    done = convert_original(BLIP, file, tmp_path / "b", vocabulary.parent)
    assert done.left_out == ("momentum copies", "queue")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == (
        ["temperature"] if kind == "retrieval" else []
    )
    first, second = (load_metadata(tmp_path / name)["model"] for name in "ab")
    differ = {name for name in first["text"] if first["text"][name] != second["text"][name]}
    assert differ == {"dropout", "attention_dropout"}
    for name in ("heads", "decoder", "decoder_reads", "fusion", "text_pool", "projection_bias", "image_pool_norm"):
        assert first[name] == second[name]
    assert first["image"]["name"] == second["image"]["name"] == "test_vit"
    assert first["image"]["image_size"] == second["image"]["image_size"] == 32
    if kind == "retrieval":
        assert other["temperature"] == 0.05
    if kind == "captioning":  # and on to transformers
        convert_to_blip(tmp_path / "b", tmp_path / "back")
        read = BlipForConditionalGeneration.from_pretrained(tmp_path / "back")
        assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@PRECISIONS
@torch.no_grad()
def test_blip_captioner(vocabulary: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = blip("captioning", vocabulary)
    ours = converted(BLIP, file_of(original(model), tmp_path), vocabulary, dtype)
    images, ids, mask = inputs(vocabulary, dtype)
    expected = model.to(dtype)(
        pixel_values=images, input_ids=_first(ids, size_of(vocabulary)), attention_mask=mask.long()
    ).logits
    memory = ours.model.memory(ours.model.encode_image(images).tokens, None, "decoder")
    close(ours.model.decode(ids, memory, mask=mask)[mask], expected[mask], tolerance)
    # The published settings: prompt, three beams, 20 tokens and at least 5 with the prompt's four.
    assert ours.prompt == "a picture of "
    assert (ours.generation.beams, ours.generation.max_length, ours.generation.min_length) == (3, 16, 1)


@PRECISIONS
@torch.no_grad()
def test_blip_of_questions(vocabulary: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """The question begins with [ENC], the answer with [DEC]; padding of the question is not attended to."""
    model = blip("vqa", vocabulary)
    predictor = converted(BLIP, file_of(original(model), tmp_path), vocabulary, dtype)
    ours, generation = predictor.model, predictor.generation
    # models/blip_vqa.py: three beams, max_length 10 and min_length 1, which count the first token; here an answer has a word.
    assert (generation.beams, generation.max_length, generation.min_length) == (3, 9, 1)
    assert predictor.max_answer_tokens == 9
    images, ids, mask = inputs(vocabulary, dtype)
    model.to(dtype)
    tokens = model.vision_model(images).last_hidden_state
    question = model.text_encoder(_first(ids, size_of(vocabulary) + 1), mask.long(), encoder_hidden_states=tokens)
    states = ours.fuse(ours.text_view(ids, mask), ours.memory(ours.encode_image(images).tokens, None, "fusion"))
    close(states[mask], question.last_hidden_state[mask], tolerance)
    logits = ours.decode(ids[:, :4], ours.memory(states, mask, "decoder"))
    for row, length in enumerate(mask.sum(1)):
        read = question.last_hidden_state[row : row + 1, :length]
        answer = _first(ids[row : row + 1, :4], size_of(vocabulary))
        close(logits[row], model.text_decoder(answer, encoder_hidden_states=read).logits[0], tolerance)


def _first(ids: Tensor, token: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], 1)


def tied_pair(vocabulary: Path) -> tuple[Any, Any, State]:
    """transformers' encoder and decoder that share all but the self-attention of their layers, and the file that holds both."""
    encoder, decoder = blip("retrieval", vocabulary), blip("captioning", vocabulary, seed=1)
    shared = {
        name: encoder.state_dict()[name.replace("text_decoder.bert.", "text_encoder.")]
        for name in decoder.state_dict()
        if name.startswith("text_decoder.bert.") and ".attention." not in name
    }
    vision = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith("vision_model.")}
    decoder.load_state_dict(shared | vision, strict=False)
    return encoder, decoder, original(encoder) | original(decoder)


@PRECISIONS
@torch.no_grad()
def test_blip_of_pretraining(vocabulary: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    encoder, decoder, state = tied_pair(vocabulary)
    ours = converted(BLIP, file_of(state, tmp_path), vocabulary, dtype).model
    assert ours.config.heads == ("contrastive", "matching", "language")
    images, ids, mask = inputs(vocabulary, dtype)
    encoder.to(dtype), decoder.to(dtype)
    similarity = encoder(ids, images, use_itm_head=False, attention_mask=mask.long()).itm_score
    image, text = ours.encode_image(images), ours.encode_text(ids, mask)
    assert text.embedding is not None
    close(image.embedding @ text.embedding.T, similarity, tolerance)
    matching = encoder(_first(ids, size_of(vocabulary) + 1), images, attention_mask=mask.long()).itm_score
    states = ours.fuse(ours.text_view(ids, mask), ours.memory(image.tokens, None, "fusion"))
    close(ours.matching_logits(states), matching, tolerance)
    causal = decoder(pixel_values=images, input_ids=_first(ids, size_of(vocabulary)), attention_mask=mask.long()).logits
    logits = ours.decode(ids, ours.memory(image.tokens, None, "decoder"), mask=mask)
    close(logits[mask], causal[mask], tolerance)


def test_a_decoder_that_does_not_share_is_told(vocabulary: Path, tmp_path: Path, capsys: Any) -> None:
    _, _, state = tied_pair(vocabulary)
    name = "text_decoder.bert.encoder.layer.1.crossattention.self.query.bias"
    state[name] = state[name] + 1
    assert "differs from 'text_encoder.encoder.layer.1.cross" in refused(
        "blip-original", file_of(state, tmp_path), vocabulary, capsys
    )


# ALBEF


@PRECISIONS
@pytest.mark.parametrize("kind", ["pretraining", "retrieval"])
@torch.no_grad()
def test_albef(kind: str, vocabulary: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    albef = Albef(vocabulary)
    ours = converted(ALBEF, file_of(copied(albef.state(kind)), tmp_path), vocabulary, dtype).model
    assert ours.config.heads == ("contrastive", "matching", *(("masked_language",) if kind == "pretraining" else ()))
    assert ours.config.image.image_size == 32
    assert ours.config.text.cross_attention == (2, 3)
    images, ids, mask = inputs(vocabulary, dtype)
    albef.to(dtype)
    tokens = albef.vision.forward_features(images)
    below = albef.layers(albef.text.bert.embeddings(ids), mask, range(2))
    fused = albef.layers(below, mask, range(2, 4), tokens)
    image, text = ours.encode_image(images), ours.encode_text(ids, mask)
    assert text.states is not None
    assert text.embedding is not None
    close(text.states[mask], below[mask], tolerance)
    close(image.embedding, nn.functional.normalize(albef.linear("vision_proj", tokens[:, 0])), tolerance)
    close(text.embedding, nn.functional.normalize(albef.linear("text_proj", below[:, 0])), tolerance)
    states = ours.fuse(text, ours.memory(image.tokens, None, "fusion"))
    close(states[mask], fused[mask], tolerance)
    close(ours.matching_logits(states), albef.linear("itm_head", fused[:, 0]), tolerance)
    assert float(ours.temperature) == pytest.approx(0.05)
    if kind == "pretraining":
        close(ours.masked_language_logits(states)[mask], albef.text.cls(fused)[mask], tolerance)


@PRECISIONS
@torch.no_grad()
def test_albef_of_questions(vocabulary: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    albef = Albef(vocabulary)
    predictor = converted(ALBEF, file_of(albef.state("vqa"), tmp_path), vocabulary, dtype)
    ours = predictor.model
    assert (ours.config.decoder, ours.config.decoder_layers, ours.config.decoder_reads) == ("separate", 2, "question")
    images, ids, mask = inputs(vocabulary, dtype)
    albef.to(dtype)
    tokens = albef.vision.forward_features(images)
    fused = albef.layers(albef.layers(albef.text.bert.embeddings(ids), mask, range(2)), mask, range(2, 4), tokens)
    states = ours.fuse(ours.text_view(ids, mask), ours.memory(ours.encode_image(images).tokens, None, "fusion"))
    close(states[mask], fused[mask], tolerance)
    expected = albef.decoder(ids[:, :4], encoder_hidden_states=fused, encoder_attention_mask=mask.long()).logits
    close(ours.decode(ids[:, :4], ours.memory(states, mask, "decoder")), expected, tolerance)


# Positions


@pytest.mark.parametrize("family", [ALBEF, BLIP], ids=["ALBEF", "BLIP"])
@pytest.mark.parametrize("size", [16, 64])
def test_positions_at_another_size_are_plainly_interpolated(
    family: Any, size: int, vocabulary: Path, tmp_path: Path
) -> None:
    """models/vit.py of both: bicubic, without antialiasing."""
    state = original(blip("retrieval", vocabulary)) if family is BLIP else Albef(vocabulary).state("retrieval")
    model = converted(family, file_of(state, tmp_path), vocabulary).model
    model.image_encoder.resize(size)
    first, grid = state["visual_encoder.pos_embed"].split([1, PATCHES], dim=1)
    side = size // 16
    plain = nn.functional.interpolate(grid.mT.reshape(1, D, 2, 2), (side, side), mode="bicubic", align_corners=False)
    expected = torch.cat([first, plain.flatten(2).mT], 1)
    close(model.state_dict()["image_encoder.backbone.pos_embed"], expected, 1e-6)


# Questions


@pytest.mark.parametrize(
    ("family", "cleaned", "another"),
    [
        (BLIP, "is the man's red/blue t-shirt, 1030, new?", "is the man's red/blue t-shirt, 1030, new"),
        (ALBEF, "is the mans red blue t shirt 1030 new", "is the man s red blue t shirt 10 30 new"),
    ],
    ids=["BLIP", "ALBEF"],
)
def test_questions_are_cleaned_as_in_the_authors_training(
    family: Any, cleaned: str, another: str, vocabulary: Path, tmp_path: Path
) -> None:
    """`pre_question` of salesforce/BLIP's data/utils.py and salesforce/ALBEF's dataset/utils.py."""
    state = original(blip("vqa", vocabulary)) if family is BLIP else Albef(vocabulary).state("vqa")
    ours = converted(family, file_of(state, tmp_path), vocabulary)
    image = Image.new("RGB", (40, 30), "red")
    typed = ours.answer(image, 'Is the man\'s "red/blue" T-shirt, (10:30), new?')
    assert typed == ours.answer(image, cleaned) != ours.answer(image, another)
    # What is trained from here is asked in the same way.
    tuned = build_parts(Config(task="vqa", init_from=str(tmp_path / "model-ours")), [])
    name = "blip" if family is BLIP else "albef"
    assert tuned.config.data.question_cleaning == tuned.tokenizer.question_cleaning == name


# Momentum copies and the queue


@pytest.mark.parametrize(("family", "size"), [("albef", K), ("albef", 4), ("albef", 16), ("blip-original", 0)])
def test_a_teacher_starts_with_the_momentum_copies_and_the_queue(
    family: str, size: int, vocabulary: Path, tmp_path: Path, capsys: Any
) -> None:
    state = copied(Albef(vocabulary).state("pretraining") if family == "albef" else tied_pair(vocabulary)[2])
    file, target = file_of(state, tmp_path), tmp_path / "ours"
    assert main(["convert", family, str(file), str(target), "--tokenizer", str(vocabulary), "--keep-momentum"]) == 0
    assert "left out" not in capsys.readouterr().out
    objectives = ObjectivesConfig(momentum=0.9, queue=size, masked_language=float(family == "albef"))
    config = Config(init_from=str(target), objectives=objectives)
    sets = [ShardSet("nowhere", "toy", ())]
    task = build_task(*_parts(config), sets=sets)
    assert isinstance(task, Pretraining)
    assert task.teacher is not None
    found = task.teacher.model.state_dict()
    assert torch.equal(found["image_encoder.backbone.cls_token"], state["visual_encoder_m.cls_token"])
    bert = "bert." if family == "albef" else ""
    there = f"text_encoder_m.{bert}encoder.layer.3.crossattention.self.key.weight"
    slot = 1 if family == "albef" else 3
    assert torch.equal(found[f"fusion_memory.keys.{slot}.weight"], state[there])
    assert torch.equal(found["text_projection.bias"], state["text_proj_m.bias"])
    assert torch.equal(found["matching_head.weight"], state["itm_head.weight"])  # has no copy
    assert not torch.equal(task.model.state_dict()["text_projection.bias"], found["text_projection.bias"])
    said = capsys.readouterr().err
    assert "momentum.safetensors: " in said
    if size:
        assert task.teacher.queue is not None
        assert f"{min(size, K)} pairs into its queue" in said
        # The pointer stands at the oldest: 3, 4, ..., 9, 0, 1, 2; the newest stay.
        order = [*range(3, K), 0, 1, 2][-size:]
        pairs = task.teacher.queue.pairs()
        assert int(pairs.valid.sum()) == len(order)
        assert (pairs.ids[pairs.valid] < 0).all(), "of no image that the data may have"
        newest = {tuple(row) for row in state["text_queue"].T[order].tolist()}
        assert {tuple(row) for row in pairs.text[pairs.valid].tolist()} == newest
        matching = {
            tuple(row): tuple(state["image_queue"].T[i].tolist())
            for i, row in enumerate(state["text_queue"].T.tolist())
        }
        assert all(
            matching[tuple(t)] == tuple(i)
            for i, t in zip(pairs.image[pairs.valid].tolist(), pairs.text[pairs.valid].tolist(), strict=True)
        )
    # At another image size the teacher has its own positions, interpolated; for evaluation nothing is loaded.
    larger = replace(config, model=ModelConfig(image=replace(ModelConfig().image, image_size=64)))
    other = build_task(*_parts(larger), sets=sets)
    assert isinstance(other, Pretraining)
    assert other.teacher is not None
    assert other.teacher.model.image_encoder.image_size == 64
    capsys.readouterr()
    build_task(*_parts(config))
    assert "momentum.safetensors" not in capsys.readouterr().err


def _parts(config: Config) -> tuple[Config, Any]:
    parts = build_parts(config, [])
    return parts.config, parts


def test_momentum_is_kept_only_where_it_is_and_has_a_use(vocabulary: Path, tmp_path: Path, capsys: Any) -> None:
    albef = Albef(vocabulary)
    keep = ("--keep-momentum",)
    file = file_of(albef.state("retrieval"), tmp_path)
    assert "holds no momentum copies" in refused("albef", file, vocabulary, capsys, *keep)
    file = file_of(copied(albef.state("vqa")), tmp_path)
    assert "has no teacher here; leave --keep-momentum out" in refused("albef", file, vocabulary, capsys, *keep)
    state = copied(albef.state("retrieval"))
    del state["text_proj_m.bias"]
    message = refused("albef", file_of(state, tmp_path), vocabulary, capsys, *keep)
    assert "ALBEF of retrieval in its momentum copies: 1 names missing (text_proj.bias)" in message
    state["text_proj_m.bias"], state["image_queue"] = torch.zeros(E), torch.zeros(E + 1, K)
    assert "queues have the shapes" in refused("albef", file_of(state, tmp_path), vocabulary, capsys, *keep)


# A VQA decoder from the fusion layers


def test_a_decoder_of_questions_starts_from_the_fusion_layers(vocabulary: Path, tmp_path: Path, capsys: Any) -> None:
    """As ALBEF's VQA.py: layers map to layers, cross-attention too, and the language head starts from the masked-language head."""
    albef = Albef(vocabulary)
    converted(ALBEF, file_of(albef.state("pretraining"), tmp_path), vocabulary)
    ours = ModelConfig(decoder="separate", decoder_layers=2, decoder_reads="question")
    model = build_parts(Config(task="vqa", init_from=str(tmp_path / "model-ours"), model=ours), []).model
    said = capsys.readouterr().err
    for line in (
        "tensors loaded, ",
        " new (decoder.embeddings, decoder.layers, decoder_memory.keys, decoder_memory.values, language_head.bias, ",
        "decoder: started from the text's layers 2 to 3\n",
        "language_head: started from the masked_language head\n",
    ):
        assert line in said
    state = model.state_dict()
    wanted = {name: name.replace("decoder.", "text.", 1) for name in state if name.startswith("decoder.embeddings.")}
    for name in state:
        if name.startswith("decoder.layers."):
            wanted[name] = re.sub(r"^decoder\.layers\.(\d)", lambda m: f"text.layers.{int(m[1]) + 2}", name)
        elif name.startswith("decoder_memory."):
            wanted[name] = name.replace("decoder_", "fusion_")
        elif name.startswith("language_head."):
            wanted[name] = f"masked_{name}"
    assert any(".cross_attention." in name for name in wanted)
    assert all(torch.equal(state[name], state[source]) for name, source in wanted.items())
    key = albef.text.state_dict()["bert.encoder.layer.3.crossattention.self.key.weight"]
    assert torch.equal(state["decoder_memory.keys.1.weight"], key)


def test_a_decoder_takes_the_self_attention_that_decodes(vocabulary: Path, tmp_path: Path) -> None:
    """BLIP's decoder has one of its own."""
    state = tied_pair(vocabulary)[2]
    converted(BLIP, file_of(state, tmp_path), vocabulary)
    ours = ModelConfig(decoder="separate", decoder_layers=4, decoder_reads="question")
    model = build_parts(Config(task="vqa", init_from=str(tmp_path / "model-ours"), model=ours), []).model
    assert model.decoder is not None
    for there, own in (("text_decoder.bert.", model.decoder), ("text_encoder.", model.text)):
        name = f"{there}encoder.layer.1.attention.self.query.weight"
        assert torch.equal(own.state_dict()["layers.1.self_attention.query.weight"], state[name])


# What is not what it says


def refused(family: str, file: Path, vocabulary: Path | None, capsys: Any, *options: str) -> str:
    """The one line that a conversion ends with; nothing is written."""
    target = file.with_name("refused")
    given = [] if vocabulary is None else ["--tokenizer", str(vocabulary)]
    assert main(["convert", family, str(file), str(target), *given, *options]) in (1, 2)
    message: str = capsys.readouterr().err
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in message
    assert not target.exists()
    return message


@pytest.mark.parametrize("family", ["albef", "blip-original"])
def test_another_model_is_told_by_the_first_names(family: str, vocabulary: Path, tmp_path: Path, capsys: Any) -> None:
    state = {f"layer{i}.weight": torch.zeros(2) for i in range(7)}
    message = refused(family, file_of(state, tmp_path), vocabulary, capsys)
    assert "names missing (visual_encoder.cls_token, visual_encoder.pos_embed, " in message
    assert (
        "7 names unexpected (layer0.weight, layer1.weight, layer2.weight, layer3.weight, layer4.weight, ...)" in message
    )
    assert message.count("visual_encoder") == 5


def test_a_file_with_other_names_shapes_or_copies_is_told(vocabulary: Path, tmp_path: Path, capsys: Any) -> None:
    albef = Albef(vocabulary)

    def told(changes: Callable[[State], Any], kind: str = "retrieval") -> str:
        state = albef.state(kind)
        changes(state)
        return refused("albef", file_of(state, tmp_path), vocabulary, capsys)

    assert "ALBEF of retrieval: 1 names missing (itm_head.bias)" in told(lambda s: s.pop("itm_head.bias"))
    message = told(lambda s: s.update({"cls_head.0.weight": torch.zeros(1)}))
    assert "1 names unexpected (cls_head.0.weight)" in message
    assert "sizes of its other tensors: 1 of another shape (matching_head.bias (3,) instead of (2,))" in told(
        lambda s: s.update({"itm_head.bias": torch.zeros(3)})
    )
    name = "text_encoder.encoder.layer.2.crossattention.self.query.bias"
    assert f"missing ({name})" in told(lambda s: s.pop(name))
    positions = torch.zeros(1, 6, D)
    assert "pos_embed is for 5 patches" in told(lambda s: s.update({"visual_encoder.pos_embed": positions}))
    blocks = torch.zeros(100, D)
    assert "no ViT of timm's has" in told(lambda s: s.update({"visual_encoder.blocks.0.mlp.fc1.weight": blocks}))
    head = "text_encoder.cls.predictions.decoder.weight"
    assert "only tied heads" in told(lambda s: s.update({head: s[head] + 1}), "pretraining")
    # A file of the other family.
    message = refused("blip-original", file_of(albef.state("retrieval"), tmp_path), vocabulary, capsys)
    assert "crossattention" in message
    assert "unexpected (text_encoder.embeddings.token_type_embeddings.weight)" in message


def test_the_vocabulary_is_needed_and_must_fit(vocabulary: Path, tmp_path: Path, capsys: Any) -> None:
    file = file_of(Albef(vocabulary).state("retrieval"), tmp_path)
    message = refused("albef", file, None, capsys)
    assert "give --tokenizer with bert-base-uncased's vocab.txt (https://huggingface.co/" in message
    (tmp_path / "vocab.txt").write_text(vocabulary.read_text() + "more\n")
    assert "give the vocabulary that it was trained with" in refused("albef", file, tmp_path / "vocab.txt", capsys)
    assert "no such file" in refused("albef", file, tmp_path / "none.txt", capsys)
    # One token too many or too few, for a model with and without [DEC] and [ENC] behind its vocabulary.
    words = vocabulary.read_text().splitlines()
    files = {"albef": file, "blip-original": file_of(original(blip("captioning", vocabulary)), tmp_path, "blip.pth")}
    for changed in (words[:-1], [*words, "more"]):
        (tmp_path / "vocab.txt").write_text("\n".join(changed) + "\n")
        for family, model in files.items():
            message = refused(family, model, tmp_path / "vocab.txt", capsys)
            assert f"has {len(changed)} tokens, but the model has {len(words)}; give the vocabulary" in message


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_nothing_is_unpickled(vocabulary: Path, tmp_path: Path, capsys: Any) -> None:
    mark, file = tmp_path / "mark", tmp_path / "evil.pth"
    for write in (
        lambda: torch.save({"model": {}, "config": Evil(mark)}, file),
        lambda: file.write_bytes(pickle.dumps({"model": Evil(mark)})),
    ):
        write()
        message = refused("albef", file, vocabulary, capsys)
        assert "evil.pth cannot be read as weights" in message
        assert "may run any program" in message
        assert not mark.exists()
    torch.save({"model": {}, "config": argparse.Namespace(a=1)}, file)
    assert "it names argparse.Namespace" in refused("albef", file, vocabulary, capsys)
    file.write_bytes(b"hello")
    assert "damaged, or not a file of torch's" in refused("albef", file, vocabulary, capsys)
    torch.save({"model": [1, 2]}, file)
    assert "holds a list, expected a state dict" in refused("albef", file, vocabulary, capsys)
    torch.save({"model": {0: torch.zeros(2), "temp": torch.ones(())}}, file)
    for family in ("albef", "blip-original"):
        assert "holds a dict, expected a state dict: tensors by name" in refused(family, file, vocabulary, capsys)
    assert "No such file" in refused("albef", tmp_path / "none.pth", vocabulary, capsys)
