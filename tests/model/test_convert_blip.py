"""transformers' BLIP and ours are the same model: numbers, words, pixels; there and back nothing changes."""

import json
import math
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipModel,
    BlipProcessor,
)
from transformers import GenerationConfig as TheirGenerationConfig

from vlm.build import build_parts
from vlm.checkpoint import write_checkpoint
from vlm.cli import main
from vlm.config import Config, GenerationConfig, ModelConfig
from vlm.convert import convert_blip, convert_to_blip
from vlm.data.text import Tokenizer, clean_question, tidy, train_wordpiece
from vlm.errors import CheckpointError, UserError
from vlm.model.convert.blip import BLIP_MODEL, VITS, from_blip_state_dict, to_blip_state_dict
from vlm.model.convert.blip_config import from_blip_config
from vlm.model.pretrained import load_metadata, load_pretrained
from vlm.predictor import Predictor
from vlm.tasks.vqa import answer_questions

SCENES = (
    "a red circle left of a blue square",
    "two dogs run on the green grass",
    "a man with a hat rides a brown horse",
    "what color is the small circle",
    "how many objects are there in the picture",
    "a picture of three black t-shirts",
)
TEXTS = ["a red circle", "two dogs run on the green grass", "how many horses are there in the picture"]
PROMPT = "a picture of "
KINDS: dict[str, Any] = {
    "captioning": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "retrieval": BlipForImageTextRetrieval,
    "model": BlipModel,
}
TINY: dict[str, Any] = {
    "text": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "sep_token_id": 3,
    },
    "vision": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 32,
    },
}
Make = Callable[..., tuple[Path, Any]]
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])


def build(kind: str, text: dict[str, Any], vision: dict[str, Any], seed: int = 0, width: float = 0.3) -> Any:
    """A random model whose output depends on the image (as transformers starts it, it does not). width: of the weights."""
    torch.manual_seed(seed)
    model = KINDS[kind](
        BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16, projection_dim=24)
    ).eval()
    for name, parameter in model.named_parameters():
        norm = name.endswith("weight") and ("norm" in name.lower())
        if name != "logit_scale":
            torch.nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=width)
    return model


def write(model: Any, folder: Path, old: bool = False, pickled: bool = False, max_shard_size: str = "5GB") -> Path:
    """A folder as transformers saves it, now or (old) in its fourth version; `pickled`: weights as in its first BLIP folders."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    train_wordpiece(SCENES * 2, 200).save(folder / "tokenizer.json")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "mask_token": "[MASK]", **names})
    )
    size = model.config.vision_config.image_size
    processor = BlipImageProcessorPil(size={"height": size, "width": size})
    if old:
        processor.save_pretrained(folder)
        released = json.loads((folder / "preprocessor_config.json").read_text()) | {"do_pad": True, "size_divisor": 32}
        (folder / "preprocessor_config.json").write_text(json.dumps(released))
        vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n")
    else:
        settings = {"image_processor": processor.to_dict(), "processor_class": "BlipProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(settings))
    if pickled:
        (folder / "model.safetensors").unlink()
        positions = torch.arange(model.config.text_config.max_position_embeddings)[None]
        extra = {f"{p}embeddings.position_ids": positions for p in ("text_decoder.bert.", "vision_model.")}
        torch.save({**model.state_dict(), **extra}, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(kind, dtype, seed, width, **options of `write`): a folder and the model in it."""

    def made(
        kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, width: float = 0.3, **options: Any
    ) -> tuple[Path, Any]:
        vocabulary = train_wordpiece(SCENES * 2, 200).vocab_size
        text = {**TINY["text"], "vocab_size": vocabulary + 2, "bos_token_id": vocabulary}
        model = build(kind, text, TINY["vision"], seed, width)
        return write(model, tmp_path / f"{kind}-{seed}", **options), model.to(dtype)

    return made


def converted(source: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Predictor:
    target = source.with_name(f"{source.name}-ours")
    convert_blip(source, target, **options)
    predictor = Predictor.load(target, "cpu")
    predictor.model.to(dtype)
    return predictor


def pictures(count: int = 4, size: int = 32) -> list[Image.Image]:
    """Large patches of colour, of several shapes."""
    g = np.random.default_rng(5)
    return [
        Image.fromarray(g.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((size + 9 * i, size + 4), 0)
        for i in range(count)
    ]


def pixels(predictor: Predictor, images: list[Image.Image], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ours (uint8) and the same normalised, for transformers."""
    ours = torch.stack([predictor.transform(image) for image in images])
    return ours, predictor.model.image_encoder.normalize(ours).to(dtype)


def encoded(predictor: Predictor, texts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [predictor.tokenizer.encode(text) for text in texts]
    mask = torch.tensor([[i < len(row) for i in range(max(map(len, rows)))] for row in rows])
    return torch.tensor([row + [0] * (mask.shape[1] - len(row)) for row in rows]), mask


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


# Captioning


@torch.no_grad()
def same_logits(source: Path, model: Any, images: list[Image.Image], dtype: torch.dtype, tolerance: float) -> None:
    predictor = converted(source, dtype)
    ours, theirs = pixels(predictor, images, dtype)
    ids, mask = encoded(predictor, TEXTS[:1] + TEXTS)
    ids[:, 0] = model.config.text_config.bos_token_id
    expected = model(pixel_values=theirs, input_ids=ids, attention_mask=mask.long())
    tokens = predictor.model.encode_image(ours).tokens
    close(tokens, expected.last_hidden_state, tolerance)
    logits = predictor.model.decode(ids, predictor.model.memory(tokens, None, "decoder"), mask=mask)
    close(logits[mask], expected.logits[mask], tolerance)
    other = model(pixel_values=theirs.flip(0), input_ids=ids, attention_mask=mask.long()).logits
    assert (other - expected.logits)[mask].abs().max() > 0.05, "the images must matter, else this shows nothing"


@PRECISIONS
@pytest.mark.parametrize("options", [{}, {"old": True, "pickled": True}, {"max_shard_size": "100KB"}])
def test_captioning_logits(make: Make, options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    source, model = make("captioning", dtype, width=0.1, **options)
    if "max_shard_size" in options:
        assert len(list(source.glob("model-*.safetensors"))) > 1
    same_logits(source, model, pictures(), dtype, tolerance)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.7, "min_length": 8}, {"no_repeat_ngram_size": 2}])
def test_captions_are_equal_strings(make: Make, beams: int, prompt: str, penalties: dict[str, Any]) -> None:
    source, model = make("captioning", torch.float64)
    settings = {"num_beams": beams, "max_length": 16, **penalties}
    (source / "generation_config.json").write_text(json.dumps(settings))
    predictor = converted(source, torch.float64, prompt=prompt)
    images = pictures(6)
    _, theirs = pixels(predictor, images, torch.float64)
    start = torch.tensor([predictor.tokenizer.encode(prompt)] * len(images))
    produced = model.generate(pixel_values=theirs, input_ids=start, **settings)
    expected = [tidy(predictor.tokenizer.decode(row)) for row in produced[:, start.shape[1] - 1 :].tolist()]
    assert [said.text for said in predictor.caption(images)] == expected
    assert len(set(expected)) > 2


@torch.no_grad()
def test_positions_at_another_size_are_transformers(make: Make) -> None:
    """Plain bicubic interpolation, not timm's, which smooths."""
    source, model = make("captioning", width=0.1)
    ours = converted(source).model
    ours.image_encoder.resize(64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = model.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    close(ours.encode_image(images).tokens, expected)


@pytest.mark.parametrize("form", ["BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipModel"])
def test_what_config_json_leaves_out_has_transformers_default(form: str) -> None:
    full = json.loads(json.dumps(BlipConfig().to_dict())) | {"architectures": [form]}
    expected = from_blip_config(full, "full")
    assert from_blip_config({"model_type": "blip", "architectures": [form]}, "empty") == expected
    for part in ("text_config", "vision_config"):
        assert from_blip_config(full | {part: {}}, "half") == expected
    # What differs from the default is read, so that the equality above says something.
    changed = full | {"projection_dim": 24, "image_text_hidden_size": 24}
    changed["text_config"] = full["text_config"] | {"num_attention_heads": 12, "bos_token_id": 7, "is_decoder": False}
    changed["vision_config"] = full["vision_config"] | {"layer_norm_eps": 1e-6}
    config = from_blip_config(changed, "changed")
    assert (config.embed_dim, config.text.heads, config.first_token) == (24, 12, {"decoder": 7})
    assert (config.text.cross_attention, config.image.norm_eps) == ((), 1e-6)


@torch.no_grad()
def test_a_model_without_cross_attention(make: Make) -> None:
    """`is_decoder: false`: its layers read the text alone, and its folder has no weights for more."""
    source, _ = make("model", width=0.1)
    settings = json.loads((source / "config.json").read_text())
    text = settings["text_config"] | {"is_decoder": False}
    model = build("model", text, settings["vision_config"], width=0.1)
    predictor = converted(write(model, source.with_name("alone")))
    assert predictor.model.config.text.cross_attention == ()
    ids, mask = encoded(predictor, TEXTS)
    expected = model.get_text_features(ids, attention_mask=mask.long())
    expected = getattr(expected, "pooler_output", expected)
    close(predictor.embed_texts(TEXTS), torch.nn.functional.normalize(expected, dim=-1))


def test_generation_config_counts_more_than_config_json(make: Make) -> None:
    source, _ = make("captioning")
    edit(source / "config.json", text_config__num_beams=4, text_config__repetition_penalty=1.3)
    (source / "generation_config.json").write_text(json.dumps({"num_beams": 2}))
    theirs = TheirGenerationConfig.from_pretrained(source)
    ours = converted(source).generation
    assert ours.beams == theirs.num_beams == 2
    assert ours.repetition_penalty == 1.3  # which stands there alone


def test_words_are_those_of_transformers_own_tokenizer(make: Make) -> None:
    source, _ = make("captioning", old=True)
    theirs, ours = AutoTokenizer.from_pretrained(source), converted(source).tokenizer
    for text in (*TEXTS, "A man's T-shirt, really?"):
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))


@pytest.mark.parametrize(
    ("where", "stated", "prompt", "expected"),
    [
        ("generation_config.json", {}, "", GenerationConfig(beams=1, max_length=20, min_length=0)),
        (
            "generation_config.json",
            {"num_beams": 3, "max_length": 20, "min_length": 5, "repetition_penalty": 1.2},
            PROMPT,
            GenerationConfig(beams=3, max_length=16, min_length=1, repetition_penalty=1.2),
        ),
        (
            "generation_config.json",
            {"max_new_tokens": 7, "min_new_tokens": 2, "length_penalty": -1.0, "no_repeat_ngram_size": 3},
            PROMPT,
            GenerationConfig(beams=1, max_length=7, min_length=2, length_penalty=-1.0, no_repeat_ngram=3),
        ),
        ("config.json", {"num_beams": 4, "max_length": 12}, "", GenerationConfig(beams=4, max_length=11, min_length=0)),
        ("generation_config.json", {"max_length": 500}, "", GenerationConfig(beams=1, max_length=39, min_length=0)),
    ],
)
def test_generation_settings_are_kept(
    make: Make, where: str, stated: dict[str, Any], prompt: str, expected: GenerationConfig
) -> None:
    source, _ = make("captioning")
    if where == "config.json":  # as folders of the fourth version have it
        content = json.loads((source / where).read_text())
        content["text_config"] |= stated
    else:
        content = stated
    (source / where).write_text(json.dumps(content))
    predictor = converted(source, prompt=prompt)
    assert predictor.generation == expected
    assert predictor.prompt == prompt


def test_generation_settings_without_a_place_are_named(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = make("captioning")
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "num_beam_groups": 1}))
    target = source.with_name("ours")
    assert main(["convert", "blip", str(source), str(target), "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == f"{target}: BlipForConditionalGeneration; left out: do_sample=True\n"
    (source / "generation_config.json").write_text(json.dumps({"max_length": 4}))
    assert main(["convert", "blip", str(source), str(target) + "2", "--prompt", PROMPT]) == 1
    assert "max_length=4 leaves no token after the 4 of the prompt" in capsys.readouterr().err


def test_a_converted_captioner_captions_and_says_what_it_lacks(make: Make, tmp_path: Path) -> None:
    source, _ = make("captioning")
    predictor = converted(source, prompt=PROMPT)
    assert predictor.model.config.heads == ("language",)
    names = set(predictor.model.state_dict())
    assert not [n for n in names if n.startswith(("image_projection", "text_projection", "matching", "masked"))]
    for attempt, what in (
        (lambda: predictor.match(pictures()[0], TEXTS), "no matching head (it has: language) and cannot match"),
        (lambda: predictor.embed_images(pictures()), "no contrastive head (it has: language) and cannot embed images"),
        (lambda: predictor.embed_texts(TEXTS), "no contrastive head (it has: language) and cannot embed texts"),
        (lambda: predictor.answer(pictures()[0], "how many"), "trained for captioning and answers no questions"),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert what in str(caught.value)
    with pytest.raises(CheckpointError, match="this model has no matching head"):
        predictor.model.matching_logits(torch.zeros(1, 2, 64))
    pictures()[0].save(tmp_path / "a.png")
    command = [sys.executable, "demos/caption.py", str(tmp_path / "a.png"), "--model", str(source) + "-ours"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == predictor.caption(pictures()[:1])[0].text != ""


# Visual question answering


QUESTIONS = [*TEXTS, "what color is the small circle", "how many dogs", "a"]
TYPED = [
    "What color is the small circle?",
    "how many dogs are there?",
    "Is the man's horse brown, or black?",
    'Is it a "t-shirt"? (Yes or no.)',
    "two dogs: left; right!",
    "how many horses are there in the picture ?",
]


@torch.no_grad()
def same_answer_logits(source: Path, model: Any, dtype: torch.dtype, tolerance: float) -> None:
    predictor = converted(source, dtype)
    assert predictor.model.config.heads == ("language",)
    ours, theirs = pixels(predictor, pictures(3, predictor.transform.size), dtype)
    ids, mask = encoded(predictor, TEXTS)
    answers, answer_mask = encoded(predictor, ["red", "two dogs", "a blue square"])
    answers[:, 0] = model.config.text_config.bos_token_id
    image = model.vision_model(pixel_values=theirs).last_hidden_state
    question = model.text_encoder(ids, mask.long(), encoder_hidden_states=image).last_hidden_state
    fusion = predictor.model.memory(predictor.model.encode_image(ours).tokens, None, "fusion")
    states = predictor.model.fuse(predictor.model.text_view(ids, mask), fusion)
    close(states[mask], question[mask], tolerance)
    logits = predictor.model.decode(answers, predictor.model.memory(states, mask, "decoder"))
    for row, length in enumerate(mask.sum(1)):  # transformers attends to the padding of questions
        own = question[row : row + 1, :length]
        expected = model.text_decoder(answers[row : row + 1], encoder_hidden_states=own).logits
        close(logits[row][answer_mask[row]], expected[0][answer_mask[row]], tolerance)


@PRECISIONS
def test_question_answering_logits(make: Make, dtype: torch.dtype, tolerance: float) -> None:
    same_answer_logits(*make("vqa", dtype, width=0.1), dtype, tolerance)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "repetition_penalty": 1.6}])
@torch.no_grad()
def test_answers_equal_one_unpadded_question_at_a_time(make: Make, settings: dict[str, Any]) -> None:
    """transformers attends to the padding of questions, so that its own batched answers are others."""
    source, model = make("vqa", torch.float64)
    settings = {"max_new_tokens": 6, **settings}
    (source / "generation_config.json").write_text(json.dumps(settings))
    predictor = converted(source, torch.float64)
    images = pictures(len(QUESTIONS))
    ours, theirs = pixels(predictor, images, torch.float64)
    expected = []
    for question, image in zip(QUESTIONS, theirs, strict=True):
        ids = torch.tensor([predictor.tokenizer.encode(question)])
        produced = model.generate(ids, image[None], torch.ones_like(ids), min_new_tokens=1, **settings)
        expected.append(tidy(predictor.tokenizer.decode(produced[0, 1:].tolist())))
    assert [predictor.answer(i, q).text for i, q in zip(images, QUESTIONS, strict=True)] == expected
    assert len(set(expected)) > 2
    ids, mask = encoded(predictor, QUESTIONS)
    module = predictor.model
    states = module.fuse(module.text_view(ids, mask), module.memory(module.encode_image(ours).tokens, None, "fusion"))
    start = torch.full((len(ids), 1), predictor.tokenizer.cls_id)
    together = answer_questions(
        module,
        predictor.tokenizer,
        module.memory(states, mask, "decoder"),
        start,
        torch.ones_like(start, dtype=torch.bool),
        None,
        [],
        predictor.generation,
        predictor.max_answer_tokens,
    )
    assert [text for text, _ in together] == expected
    with pytest.raises(CheckpointError, match="answers questions only"):
        predictor.caption(images)


@pytest.mark.parametrize("beams", [1, 3])
def test_questions_are_read_as_they_are_typed(make: Make, beams: int) -> None:
    """As transformers' processor does it, which cleans nothing."""
    source, model = make("vqa", torch.float64)
    settings = {"max_new_tokens": 6, "num_beams": beams}
    (source / "generation_config.json").write_text(json.dumps(settings))
    predictor, words = converted(source, torch.float64), AutoTokenizer.from_pretrained(source)
    images = pictures(len(TYPED))
    _, theirs = pixels(predictor, images, torch.float64)

    def answers(questions: list[str]) -> list[str]:
        found = []
        for question, image in zip(questions, theirs, strict=True):
            ids = torch.tensor([words(question).input_ids])
            produced = model.generate(ids, image[None], torch.ones_like(ids), min_new_tokens=1, **settings)
            found.append(tidy(predictor.tokenizer.decode(produced[0, 1:].tolist())))
        return found

    expected = answers(TYPED)
    assert [predictor.answer(i, q).text for i, q in zip(images, TYPED, strict=True)] == expected
    assert expected != answers([clean_question(question) for question in TYPED]), "it must matter"


@pytest.mark.parametrize("cleaning", ["vlm", "blip", "none"])
def test_the_cleaning_of_questions_comes_back(make: Make, cleaning: str) -> None:
    source, _ = make("vqa")
    ours, back, again = (source.with_name(name) for name in ("ours", "back", "again"))
    convert_blip(source, ours)
    assert load_metadata(ours)["text"]["question_cleaning"] == "none"
    edit(ours / "config.json", text__question_cleaning=cleaning)
    told = convert_to_blip(ours, back).left_out
    assert [line for line in told if "questions" in line] == (
        [] if cleaning == "none" else [f"the cleaning of questions ({cleaning}), which is done by hand there"]
    )
    BlipForQuestionAnswering.from_pretrained(back)
    convert_blip(back, again)
    assert load_metadata(again) == load_metadata(ours)
    edit(back / "config.json", question_cleaning="clip")
    refused(back, "config.json: question_cleaning is 'clip', expected one of vlm, blip, albef, none")


# Retrieval


@torch.no_grad()
def same_scores(source: Path, model: Any, dtype: torch.dtype, tolerance: float) -> None:
    predictor = converted(source, dtype)
    assert predictor.model.config.heads == ("contrastive", "matching")
    images = pictures(3, predictor.transform.size)
    ours, theirs = pixels(predictor, images, dtype)
    ids, mask = encoded(predictor, TEXTS)
    similarity = model(ids, theirs, use_itm_head=False, attention_mask=mask.long()).itm_score
    image, text = predictor.embed_images(images), predictor.embed_texts(TEXTS)
    close(image @ text.T, similarity, tolerance)
    close(
        image,
        torch.nn.functional.normalize(model.vision_proj(model.vision_model(theirs).last_hidden_state[:, 0])),
        tolerance,
    )
    scores = model(ids, theirs, attention_mask=mask.long()).itm_score
    memory = predictor.model.memory(predictor.model.encode_image(ours).tokens, None, "fusion")
    close(
        predictor.model.matching_logits(predictor.model.fuse(predictor.model.text_view(ids, mask), memory)),
        scores,
        tolerance,
    )
    chances = torch.tensor([predictor.match(image, [text])[0] for image, text in zip(images, TEXTS, strict=True)])
    close(chances, scores.float().softmax(1)[:, 1])
    assert similarity.std() > 0.02
    with pytest.raises(
        CheckpointError, match=r"no language head \(it has: contrastive, matching\) and cannot make cap"
    ):
        predictor.caption(images)
    with pytest.raises(CheckpointError, match="answers no questions"):
        predictor.answer(images[0], "how many dogs")


@PRECISIONS
def test_embeddings_and_matching_scores(make: Make, dtype: torch.dtype, tolerance: float) -> None:
    same_scores(*make("retrieval", dtype, width=0.1), dtype, tolerance)


@PRECISIONS
@torch.no_grad()
def test_blip_model(make: Make, dtype: torch.dtype, tolerance: float) -> None:
    source, model = make("model", dtype, width=0.1)
    predictor = converted(source, dtype)
    assert predictor.model.config.heads == ("contrastive",)
    images = pictures(3)
    _, theirs = pixels(predictor, images, dtype)
    ids, mask = encoded(predictor, TEXTS)
    expected = model(ids, theirs, mask.long())
    image, text = predictor.embed_images(images), predictor.embed_texts(TEXTS)
    close(image, expected.image_embeds, tolerance)
    close(text, expected.text_embeds, tolerance)
    close(image @ text.T / predictor.model.temperature, expected.logits_per_image, 1e-5)
    assert expected.logits_per_image.std() > 0.1
    with pytest.raises(CheckpointError, match=r"no matching head \(it has: contrastive\)"):
        predictor.match(images[0], TEXTS)


def test_every_scale_of_the_logits_comes_back_to_the_bit(make: Make) -> None:
    """From e to 1000, through temperatures that are the nearest of fp32; log in fp32 would lose some, exp in fp32 make neighbours of some."""
    source, _ = make("model")
    content, state = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    scales = torch.linspace(1.0, 6.9, 2000)
    config = from_blip_config(content, "test")
    ours = from_blip_state_dict(state | {"logit_scale": scales}, BLIP_MODEL, config, "test")
    assert torch.equal(ours["temperature"], torch.tensor([math.exp(-scale) for scale in scales.tolist()]))
    assert torch.equal(to_blip_state_dict(ours, BLIP_MODEL, config)["logit_scale"], scales)


@pytest.mark.parametrize("scale", [1.0, 1.7, 2.6592, 3.3, 4.6052, 6.9])
def test_scale_of_the_logits_comes_back_exactly(make: Make, scale: float) -> None:
    source, _ = make("model")
    state = load_file(source / "model.safetensors")
    state["logit_scale"] = torch.tensor(scale)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    convert_blip(source, source.with_name("ours"))
    convert_to_blip(source.with_name("ours"), source.with_name("back"))
    assert (
        load_file(source.with_name("back") / "model.safetensors")["logit_scale"].item() == state["logit_scale"].item()
    )


def test_banned_words_go_with_the_model(make: Make) -> None:
    """transformers' `generate` with the generation settings of the folder that comes back says what we say."""
    source, model = make("captioning", torch.float64)
    predictor, ours = converted(source, torch.float64), Path(f"{source}-ours")
    images = pictures(6)
    before = [said.text for said in predictor.caption(images)]
    word = Counter(" ".join(before).split()).most_common(1)[0][0]
    metadata = load_metadata(ours)
    metadata["generation"] |= {"banned_words": [word], "beams": 3, "no_doubled_words": True}
    (ours / "config.json").write_text(json.dumps(metadata))
    predictor = Predictor.load(ours, "cpu")
    predictor.model.double()
    assert convert_to_blip(ours, source.with_name("back")).left_out[-1] == "no_doubled_words"
    settings = json.loads((source.with_name("back") / "generation_config.json").read_text())
    _, theirs = pixels(predictor, images, torch.float64)
    start = torch.tensor([predictor.tokenizer.encode("")] * len(images))
    settings["bad_words_ids"] += [
        [token, token] for token in range(model.config.text_config.vocab_size)
    ]  # which stays behind
    known = ("bad_words_ids", "num_beams", "max_new_tokens", "min_new_tokens")
    produced = model.generate(pixel_values=theirs, input_ids=start, **{name: settings[name] for name in known})
    expected = [tidy(predictor.tokenizer.decode(row)) for row in produced[:, start.shape[1] - 1 :].tolist()]
    assert [said.text for said in predictor.caption(images)] == expected
    assert word in " ".join(before).split()
    assert word not in " ".join(expected).split()


# Both ways


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_is_bit_identical(make: Make, kind: str, dtype: torch.dtype) -> None:
    source, _ = make(kind)
    state = load_file(source / "model.safetensors")
    save_file({k: v.to(dtype) for k, v in state.items()}, source / "model.safetensors", {"format": "pt"})
    ours, back = source.with_name("ours"), source.with_name("back")
    convert_blip(source, ours)
    convert_to_blip(ours, back)
    result = load_file(back / "model.safetensors")
    assert result.keys() == state.keys()
    assert all(result[k].dtype == dtype and torch.equal(result[k], state[k].to(dtype)) for k in state)
    again = source.with_name("again")
    convert_blip(back, again)
    first, second = load_file(ours / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert load_metadata(again) == load_metadata(ours)
    assert Tokenizer.load(again).to_json() == Tokenizer.load(ours).to_json()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_written(make: Make, kind: str) -> None:
    source, model = make(kind)
    ours, back = source.with_name("ours"), source.with_name("back")
    convert_blip(source, ours)
    assert main(["convert", "to-blip", str(ours), str(back)]) == 0
    read, report = KINDS[kind].from_pretrained(back, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, expected = read.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in expected)
    for part in ("text_config", "vision_config"):
        theirs, here = (getattr(m.config, part).to_dict() for m in (model, read))
        unused = {"initializer_range", "dtype", "eos_token_id", "_name_or_path", "architectures"}
        assert {k: v for k, v in theirs.items() if k not in unused} == {
            k: v for k, v in here.items() if k not in unused
        }
    before, after = BlipProcessor.from_pretrained(source), BlipProcessor.from_pretrained(back)
    image = pictures(3)[2]
    one, other = (p(images=image, text=TEXTS[1], return_tensors="pt") for p in (before, after))
    assert torch.equal(one.pixel_values, other.pixel_values)
    assert one.input_ids.tolist() == other.input_ids.tolist()


@pytest.mark.parametrize("old", [False, True])
def test_preprocessing_is_transformers_to_the_last_bit(make: Make, old: bool) -> None:
    source, _ = make("captioning", old=old)
    predictor = converted(source)
    processor = BlipImageProcessorPil.from_pretrained(source)
    g = np.random.default_rng(0)
    images = [Image.fromarray(g.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in [(32, 32), (97, 41), (7, 300)]]
    images += [image.convert("L") for image in images] + [images[1].convert("P"), images[1].convert("RGBA")]
    for image in images:
        expected = processor(images=[image], return_tensors="pt").pixel_values
        result = predictor.model.image_encoder.normalize(predictor._tensor([image]))
        assert torch.equal(result, expected)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    expected = BlipImageProcessorPil(do_resize=False)(images=list(every), return_tensors="pt").pixel_values
    assert torch.equal(predictor.model.image_encoder.normalize(every), expected)


def test_vits_are_timm_s() -> None:
    for name, shape in VITS.items():
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0)
        block = vit.blocks[0]
        found = (vit.embed_dim, len(vit.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
        assert (*found, vit.patch_embed.patch_size[0]) == (
            *(shape.dim, shape.layers, shape.heads, shape.feed_forward_dim),
            shape.patch,
        )


# What is not what it says


def refused(source: Path, *wanted: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_blip(source, source.with_name("refused"))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in wanted:
        assert part in message, message
    assert not source.with_name("refused").exists()


def edit(file: Path, **changes: Any) -> None:
    """Settings changed; a key `a__b` stands in `a`."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        place = content
        *outer, last = key.split("__")
        for name in outer:
            place = place[name]
        place[last] = value
    file.write_text(json.dumps(content))


def test_names_that_do_not_fit_are_told(make: Make) -> None:
    source, _ = make("captioning")
    edit(source / "config.json", architectures=["BlipForQuestionAnswering"])
    refused(source, "names missing (text_encoder.embeddings.word_embeddings.weight", "BlipForQuestionAns")
    edit(source / "config.json", architectures=["BlipForConditionalGeneration"])
    state = load_file(source / "model.safetensors")
    del state["vision_model.post_layernorm.bias"]
    state["vision_model.encoder.layers.0.gate"] = torch.zeros(1)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    refused(source, "1 names missing (vision_model.post_layernorm.bias)", "1 names unexpected", "layers.0.gate)")
    del state["vision_model.encoder.layers.0.gate"]
    state["vision_model.post_layernorm.bias"] = torch.zeros(3)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    refused(source, "norm.bias (3,) instead of (64,)")
    state["text_decoder.cls.predictions.decoder.bias"] = state["text_decoder.cls.predictions.bias"] + 1
    state["vision_model.post_layernorm.bias"] = torch.zeros(64)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    refused(source, "only tied heads")


@pytest.mark.parametrize(
    ("file", "changes", "wanted"),
    [
        ("config.json", {"model_type": "blip-2"}, "model_type is 'blip-2', expected 'blip'"),
        ("config.json", {"architectures": ["BlipVisionModel"]}, "expected one of BlipForConditionalGeneration"),
        ("config.json", {"vision_config__hidden_act": "quick_gelu"}, "hidden_act is 'gelu' and 'quick_gelu'"),
        ("config.json", {"vision_config__num_hidden_layers": 5}, "no ViT of timm's has vision_config's shape"),
        ("config.json", {"text_config__bos_token_id": 30522}, "bos_token_id is 30522, but the model has 144 tokens"),
        ("config.json", {"text_config__num_hidden_layers": "two"}, "config.json: cannot be used (TypeError"),
        ("config.json", {"text_config": "damaged"}, "config.json: cannot be used (AttributeError"),
        ("config.json", {"text_config__sep_token_id": 102}, "sep_token_id is 102, the tokenizer's is 3"),
        ("config.json", {"text_config__vocab_size": 9}, "but the model has 9 tokens; the files do not belong together"),
        ("processor_config.json", {"image_processor__resample": 2}, "resample is 2, expected 3"),
        ("processor_config.json", {"image_processor__image_mean": [0.5]}, "image_mean=[0.5], image_std="),
        ("generation_config.json", {"num_beams": "3"}, "generation setting num_beams is '3', expected a number"),
        ("processor_config.json", {"image_processor__do_normalize": False}, "do_normalize is False, expected True"),
        ("processor_config.json", {"image_processor__rescale_factor": 0.5}, "rescale_factor is 0.5, expected 0.0039"),
        ("processor_config.json", {"image_processor__size": 384}, "size is 384, but the model's images are of 32 px"),
    ],
)
def test_settings_that_do_not_fit_are_told(make: Make, file: str, changes: dict[str, Any], wanted: str) -> None:
    source, _ = make("captioning")
    edit(source / file, **changes)
    refused(source, wanted)


def test_files_that_are_missing_or_damaged_are_told(make: Make) -> None:
    source, _ = make("captioning")
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    refused(source, "neither model.safetensors nor pytorch_model.bin")
    (source / "model.safetensors").write_bytes(weights[:2000])
    refused(source, "cut short or damaged")
    (source / "model.safetensors").write_bytes(weights)
    (source / "processor_config.json").rename(source / "kept.json")
    refused(source, "neither processor_config.json with an image_processor nor preprocessor_config.json")
    (source / "config.json").write_text("{")
    refused(source, "config.json is not readable as JSON")
    refused(source.with_name("nowhere"), "config.json does not exist; give a folder")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("plain", [True, False])
def test_nothing_is_unpickled(make: Make, tmp_path: Path, plain: bool) -> None:
    source, _ = make("captioning", pickled=True)
    file, mark = source / "pytorch_model.bin", tmp_path / "mark"
    if plain:
        file.write_bytes(pickle.dumps({"a": Evil(mark)}))
    else:
        torch.save({"a": Evil(mark)}, file)
    refused(source, "pytorch_model.bin cannot be read as weights")
    assert not mark.exists()


def test_nothing_is_overwritten(make: Make) -> None:
    source, _ = make("captioning")
    for convert in (convert_blip, convert_to_blip):
        with pytest.raises(UserError, match="exists; give another folder"):
            convert(source, source)


def test_models_of_another_structure_do_not_become_blip(
    checkpoint: Callable[..., Path], tmp_path: Path, make: Make
) -> None:
    with pytest.raises(
        CheckpointError, match=r"model\.text\.token_types is True, but BlipForConditionalGeneration has"
    ):
        convert_to_blip(checkpoint("captioning"), tmp_path / "a")
    with pytest.raises(CheckpointError, match="form `prompted`, which BLIP does not have"):
        convert_to_blip(checkpoint("vqa"), tmp_path / "a")
    with pytest.raises(CheckpointError, match="image encoder test_efficientnet"):
        convert_to_blip(checkpoint("captioning", image="test_efficientnet"), tmp_path / "a")
    source, _ = make("retrieval")
    with pytest.raises(UserError, match="a prompt is for captions"):
        convert_blip(source, tmp_path / "b", prompt=PROMPT)


# On from here


def test_training_goes_on_from_a_converted_captioner(make: Make) -> None:
    source, _ = make("captioning")
    converted(source)
    folder = f"{source}-ours"
    parts = build_parts(Config(task="captioning", init_from=folder), [])
    assert parts.config.model.heads == ("language",)
    assert parts.config.model.image.norm_eps == 1e-5
    pretraining = build_parts(Config(task="pretraining", init_from=folder), [])
    assert pretraining.config.model.heads == ModelConfig().heads
    state, more = load_pretrained(folder)[0].state_dict(), pretraining.model.state_dict()
    assert all(torch.equal(more[name], state[name]) for name in state)
    out = source.with_name("tuned")
    write_checkpoint(out, pretraining.config, pretraining.model, pretraining.tokenizer.to_json(), {})
    back = convert_to_blip(out, source.with_name("back"))
    assert back.name == "BlipForImageTextRetrieval"
    assert back.left_out == ("the masked_language head", "the language head", "the temperature 0.07")


# At the size of the released models


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captioning", "vqa", "retrieval"])
def test_base_size(kind: str, tmp_path: Path) -> None:
    text = {"num_attention_heads": 12, "hidden_size": 768, "sep_token_id": 3}
    model = build(kind, text, {}, width=0.03)
    source = write(model, tmp_path / kind)
    if kind == "captioning":
        same_logits(source, model, pictures(size=384), torch.float32, 1e-5)
    else:
        {"vqa": same_answer_logits, "retrieval": same_scores}[kind](source, model, torch.float32, 1e-5)
    back = tmp_path / "back"
    convert_to_blip(Path(f"{source}-ours"), back)
    read = KINDS[kind].from_pretrained(back)
    state, expected = read.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    if kind == "captioning":
        images = pictures(2, 384)
        predictor = Predictor.load(f"{source}-ours", "cpu")
        predictor.model.double()
        _, theirs = pixels(predictor, images, torch.float64)
        start = torch.tensor([predictor.tokenizer.encode("")] * 2)
        for beams in (1, 3):
            settings = {"num_beams": beams, "max_length": 9}
            produced = model.double().generate(pixel_values=theirs, input_ids=start, **settings)
            expected_words = [tidy(predictor.tokenizer.decode(row)) for row in produced[:, 1:].tolist()]
            assert [said.text for said in predictor.caption(images, beams, max_length=8)] == expected_words
