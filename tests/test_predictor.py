"""The predictor: what it says depends on the image and its settings alone, and equals what the tasks evaluate."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor

from vlm.build import sample_encoder
from vlm.checkpoint import read_answers
from vlm.config import Config, DataConfig, GenerationConfig, VqaConfig
from vlm.data.collate import collate
from vlm.data.records import Record
from vlm.data.text import Tokenizer
from vlm.errors import BadImage, CheckpointError, ConfigError
from vlm.model.pretrained import load_pretrained
from vlm.predictor import Predictor, Said
from vlm.tasks.vqa import build_vqa

ANSWERS = ("yes", "no", "three", "red", "brown horse", "a blue square")
QUESTIONS = ("What color is the small circle?", "How many dogs?", "Is there a man with a hat in the green picture?")
READS_QUESTION = {"decoder": "separate", "decoder_reads": "question", "decoder_layers": 2}
LATE = {"fusion": "late", "text": {"layers": 3, "cross_attention": (1, 2)}}


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """Large patches of colour, others for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture
def predictor(checkpoint: Callable[..., Path]) -> Predictor:
    return Predictor.load(checkpoint(), "cpu")


def test_an_image_may_be_a_path_its_bytes_or_an_open_image(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(picture()))
    with Image.open(path) as opened:
        said = predictor.caption([path, str(path), path.read_bytes(), opened, picture()])
    assert said[0].text
    assert {s.text for s in said} == {said[0].text}
    assert all(0 < s.confidence <= 1 for s in said)


def test_captions_do_not_depend_on_the_batch(predictor: Predictor) -> None:
    images = [picture(seed) for seed in range(7)]
    alone = [predictor.caption([image])[0] for image in images]
    assert len({s.text for s in alone}) > 1, "the images must matter, else this shows nothing"
    for size in (2, 7):
        together = predictor.caption(images[::-1], batch_size=size)[::-1]
        assert [s.text for s in together] == [s.text for s in alone]
        assert [s.confidence for s in together] == pytest.approx([s.confidence for s in alone], rel=1e-4)
    drawn = [predictor.caption([image], sampled=True, seed=3)[0].text for image in images]
    assert [s.text for s in predictor.caption(images, sampled=True, seed=3, batch_size=3)] == drawn


def test_compiled_it_says_the_same(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched and drawn. The compiler's own backend needs a C++ compiler, and half a minute."""
    steps = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=steps))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    folder, images = checkpoint(), [picture(seed) for seed in range(3)]
    plain, compiled = Predictor.load(folder, "cpu"), Predictor.load(folder, "cpu", compile=True)
    expected = [plain.captions(images, 2), plain.captions(images, 2, sampled=True), plain.captions(images, 1, beams=1)]
    torch._dynamo.reset()
    assert steps.frame_count == 0
    found = [
        compiled.captions(images, 2),
        compiled.captions(images, 2, sampled=True),
        compiled.captions(images, 1, beams=1),
    ]
    assert steps.frame_count > 0
    assert [[[s.text for s in texts] for texts in way] for way in found] == [
        [[s.text for s in texts] for texts in way] for way in expected
    ]


def test_without_a_compiler_it_says_what_is_missing(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    with (
        inductor.patch({"cpp.cxx": (None, "/no/such/compiler")}),
        pytest.raises(ConfigError, match="C\\+\\+ compiler, and none is found; install g\\+\\+"),
    ):
        Predictor.load(folder, "cpu", compile=True)


def test_dropout_of_training_changes_nothing(checkpoint: Callable[..., Path]) -> None:
    """A known fault of peers: dropout that is active in evaluation."""
    images, texts = [picture(seed) for seed in range(3)], ["a red circle", "two dogs"]
    found = []
    for rate in (0.0, 0.5):
        own = Predictor.load(checkpoint(text={"dropout": rate, "attention_dropout": rate}), "cpu")
        assert own.model.config.text.dropout == rate
        found.append((own.caption(images), own.match(images[0], texts), own.embed_texts(texts).tolist()))
    assert found[0] == found[1]


def test_settings_override_the_checkpoint_s(predictor: Predictor) -> None:
    images = [picture(seed) for seed in range(6)]

    assert predictor.generation == GenerationConfig(beams=2, max_length=8, min_length=2)
    short = predictor.caption(images, beams=1, max_length=3)
    long = predictor.caption(images, beams=1, max_length=20, min_length=12)
    for one, other in zip(short, long, strict=True):
        assert other.text.startswith(one.text)
        assert len(other.text) > len(one.text)
    one, many = predictor.caption(images, beams=1), predictor.caption(images, beams=6)
    assert [s.text for s in one] != [s.text for s in many]
    assert [s.text for s in predictor.caption(images, beams=2)] == [s.text for s in predictor.caption(images)]
    assert predictor.generation.beams == 2, "a call changes nothing for the next one"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 0}, "beams=0"),
        ({"min_lenght": 3}, "did you mean min_length"),
        ({"max_length": 200}, "max_positions=48"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"banned_words": "dog"}, "banned_words is a single text"),
        ({"banned_words": [" "]}, "has no letters"),
    ],
)
def test_unusable_settings_are_named(predictor: Predictor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predictor.caption([picture()], **settings)


def test_banned_words_are_not_said(predictor: Predictor) -> None:
    images = [picture(seed) for seed in range(4)]
    plain = predictor.caption(images)
    banned = sorted({word for said in plain for word in said.text.split() if word.isalpha()})[:3]
    assert len(banned) > 1
    for sampled in (False, True):
        for said in predictor.captions(images, 2, sampled=sampled, banned_words=banned):
            assert not {word for s in said for word in s.text.split()} & set(banned)


def test_sampling_is_reproducible_by_its_seed(predictor: Predictor) -> None:
    texts = [predictor.caption([picture()], sampled=True, seed=seed)[0].text for seed in range(5)]
    assert texts == [predictor.caption([picture()], sampled=True, seed=seed)[0].text for seed in range(5)]
    assert len(set(texts)) > 2
    before = torch.random.get_rng_state()
    predictor.caption([picture()], sampled=True)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are their own"


def test_the_prompt_is_read_and_not_repeated(checkpoint: Callable[..., Path]) -> None:
    plain, prompted = Predictor.load(checkpoint(), "cpu"), Predictor.load(checkpoint(prompt="a red"), "cpu")
    plain_texts = [s.text for s in plain.caption([picture(i) for i in range(5)])]
    texts = [s.text for s in prompted.caption([picture(i) for i in range(5)])]
    assert texts != plain_texts
    assert not all(text.startswith("a red") for text in texts)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_rotated_photograph_is_read_upright(predictor: Predictor, orientation: int, tmp_path: Path) -> None:
    upright = picture(3)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    path.write_bytes(png(upright.transpose(turn), exif=exif))
    with Image.open(path) as opened:
        said = predictor.caption([upright, path, opened])
    assert len({(s.text, round(s.confidence, 5)) for s in said}) == 1


def test_an_open_image_of_16_bits_is_scaled_and_not_clipped(predictor: Predictor) -> None:
    deep = Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)
    assert torch.equal(predictor.embed_images([deep]), predictor.embed_images([png(deep)]))
    assert torch.equal(predictor.embed_images([deep]), predictor.embed_images([picture().convert("L")]))


def test_bad_images_are_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png(picture())[:-40])
    for image in (tmp_path / "none.png", tmp_path / "cut.png"):
        with pytest.raises(BadImage, match=image.name):
            predictor.caption([image])
    with Image.open(tmp_path / "cut.png") as opened, pytest.raises(BadImage, match="damaged"):
        predictor.caption([opened])
    with pytest.raises(BadImage, match="not an image"):
        predictor.embed_images([b"hello"])


def record(seed: int) -> Record:
    asked = [{"question_id": i, "question": q, "answers": ["yes"]} for i, q in enumerate(QUESTIONS)]
    return Record("scenes", f"k{seed}", png(picture(seed)), [], asked, seed, seed)


@pytest.mark.parametrize("answers", [ANSWERS, ()], ids=["list", "open"])
@pytest.mark.parametrize(
    "model", [{}, READS_QUESTION, LATE | READS_QUESTION], ids=["prompted", "encoder_decoder", "late"]
)
def test_answers_equal_the_task_s(
    checkpoint: Callable[..., Path], answers: tuple[str, ...], model: dict[str, Any]
) -> None:
    folder = checkpoint("vqa", answers, **model)
    predictor = Predictor.load(folder, "cpu")
    weights, _ = load_pretrained(folder)
    form: Any = "encoder_decoder" if model else "prompted"
    inference: Any = "rank" if answers else "generate"
    config = Config(
        task="vqa",
        model=weights.config,
        data=DataConfig(max_tokens=24),
        vqa=VqaConfig(form=form, inference=inference),
        generation=predictor.generation,
    )
    tokenizer = Tokenizer.load(folder)
    task = build_vqa(weights, tokenizer, config, read_answers(folder)).eval()
    encode = sample_encoder(config, tokenizer, 32, training=False)
    seeds = range(4)
    expected = task.predict(collate([encode(record(seed), 0) for seed in seeds], tokenizer.pad_id))
    got = [predictor.answer(picture(seed), question) for seed in seeds for question in QUESTIONS]
    assert [s.text for s in got] == [r["answer"] for r in expected]
    assert [s.confidence for s in got] == pytest.approx([r["confidence"] for r in expected], rel=1e-3)
    assert len({f"{s.confidence:.4g}" for s in got}) > 6, "image and question must matter, else this shows nothing"
    assert not answers or {s.text for s in got} <= set(answers)


def test_the_confidence_of_a_whole_list_is_the_answer_s_share_of_it(checkpoint: Callable[..., Path]) -> None:
    """Where the checkpoint ranks all of its list; else it is the answer's own probability, as of a list of that answer alone."""
    one = Predictor.load(checkpoint("vqa", ANSWERS), "cpu")

    def ask(inference: str, answers: tuple[str, ...]) -> Said:
        metadata = one.metadata | {"vqa": one.metadata["vqa"] | {"inference": inference}}
        return Predictor(one.model, one.tokenizer, metadata, answers).answer(picture(), QUESTIONS[0])

    alone = {answer: ask("rank", (answer,)).confidence for answer in ANSWERS}
    best, shared = ask("rank", ANSWERS), ask("rank_all", ANSWERS)
    assert best.text == shared.text == max(alone, key=alone.__getitem__)
    assert best.confidence == pytest.approx(alone[best.text], rel=1e-4)
    assert shared.confidence == pytest.approx(alone[best.text] / sum(alone.values()), rel=1e-4)
    assert shared.confidence > 2 * best.confidence


def test_question_marks_and_case_do_not_matter(checkpoint: Callable[..., Path]) -> None:
    predictor = Predictor.load(checkpoint("vqa", ANSWERS), "cpu")
    assert predictor.answer(picture(), "HOW MANY dogs?") == predictor.answer(picture(), "how many  dogs")


@pytest.mark.parametrize("model", [{}, LATE], ids=["full", "late"])
def test_match_is_the_matching_head_s_probability(checkpoint: Callable[..., Path], model: dict[str, Any]) -> None:
    predictor = Predictor.load(checkpoint("pretraining", **model), "cpu")
    texts = ["two dogs run on the green grass", "a man", "a red circle left of a blue square", "yes"]
    got = predictor.match(picture(), texts)
    weights, tokenizer = predictor.model, predictor.tokenizer
    logits = []
    with torch.no_grad():
        image = weights.encode_image(predictor.transform(picture())[None])
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text)])
            states = weights.fuse(
                weights.encode_text(ids, torch.ones_like(ids, dtype=torch.bool)),
                weights.memory(image.tokens, None, "fusion"),
            )
            logits.append(weights.matching_logits(states)[0])
    expected = torch.stack(logits).softmax(1)[:, 1]
    assert got == pytest.approx(expected.tolist(), rel=1e-3)
    assert all(0 < p < 1 for p in got)
    margins = torch.stack(logits).diff(dim=1)[:, 0]
    assert sorted(range(4), key=got.__getitem__) == margins.argsort().tolist()
    assert predictor.match(picture(), texts * 40)[-4:] == pytest.approx(got, rel=1e-3), "more texts than one pass takes"


def test_embeddings_are_unit_vectors_of_their_item_alone(predictor: Predictor) -> None:
    images, texts = [picture(seed) for seed in range(5)], ["a man", "two dogs run on the green grass", "yes"]
    image, text = predictor.embed_images(images, batch_size=2), predictor.embed_texts(texts)
    assert image.shape == (5, 16)
    assert text.shape == (3, 16)
    for found in (image, text):
        assert found.norm(dim=1).tolist() == pytest.approx([1.0] * len(found), abs=1e-5)
    torch.testing.assert_close(predictor.embed_images(images[3:4])[0], image[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predictor.embed_texts(texts[:1])[0], text[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(image[0], image[1], atol=1e-2)


def test_nothing_in_nothing_out(predictor: Predictor) -> None:
    assert predictor.caption([]) == []
    assert predictor.match(picture(), []) == []
    assert predictor.embed_images([]).shape == predictor.embed_texts([]).shape == (0, 16)


def test_a_single_item_where_a_list_is_expected(predictor: Predictor) -> None:
    for call in (predictor.caption, predictor.embed_images, predictor.embed_texts):
        with pytest.raises(TypeError, match=r"write \['img.jpg'\]"):
            call("img.jpg")  # type: ignore[operator]
    with pytest.raises(TypeError, match="expected a list"):
        predictor.match(picture(), "a man")


def test_what_a_checkpoint_cannot_do(checkpoint: Callable[..., Path]) -> None:
    reader = Predictor.load(checkpoint("vqa", ANSWERS, **READS_QUESTION), "cpu")
    with pytest.raises(CheckpointError, match="reads the question, not the image") as caught:
        reader.caption([picture()])
    assert "\n" not in str(caught.value)
    for task in ("captioning", "pretraining"):
        with pytest.raises(CheckpointError, match=f"trained for {task} and answers no questions"):
            Predictor.load(checkpoint(task), "cpu").answer(picture(), "how many dogs?")
    assert Predictor.load(checkpoint("vqa", ANSWERS), "cpu").caption([picture()])[0].text, "a prompted one can do both"


def test_devices_that_are_not_there(checkpoint: Callable[..., Path]) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
            Predictor.load(checkpoint(), device)


def test_folders_that_are_no_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        Predictor.load(tmp_path / "none")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        broken = tmp_path / f"without_{name}"
        shutil.copytree(checkpoint(), broken)
        (broken / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            Predictor.load(broken)


def test_a_tokenizer_of_another_model(checkpoint: Callable[..., Path], predictor: Predictor) -> None:
    text = replace(predictor.model.config.text, vocab_size=predictor.tokenizer.vocab_size - 1)
    predictor.model.config = replace(predictor.model.config, text=text)
    with pytest.raises(CheckpointError, match="do not belong together"):
        Predictor(predictor.model, predictor.tokenizer, predictor.metadata)
