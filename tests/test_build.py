"""What a run is made of: new, from a checkpoint, or from BERT-shaped weights; and that what is evaluated was not trained on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.build import (
    Parts,
    build_parts,
    build_task,
    image_hiding,
    load_sets,
    sample_encoder,
    training_loader,
)
from vlm.checkpoint import write_checkpoint
from vlm.config import (
    Config,
    DataConfig,
    FinetuneConfig,
    GenerationConfig,
    ImageConfig,
    ModelConfig,
    ObjectivesConfig,
    RetrievalConfig,
    SplitsConfig,
    TextConfig,
    TokenizerConfig,
    TrainConfig,
    VqaConfig,
)
from vlm.data.hiding import PatchHiding
from vlm.data.samples import CaptionEncoder, JointEncoder, QuestionEncoder
from vlm.data.shards import ShardSet, ShardWriter, load_index
from vlm.data.text import Tokenizer
from vlm.errors import ConfigError, UserError
from vlm.held_out import check_held_out, training_images
from vlm.model.convert.bert import TextWeights, to_bert_state_dict
from vlm.model.text_transformer import TextTransformer
from vlm.model.vocabulary_head import VocabularyHead
from vlm.tasks.captioning import CaptioningTask
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.vqa import PromptedVqa
from vlm.train.distributed import Ranks

WORDS = (
    "a",
    "red",
    "circle",
    "left",
    "of",
    "blue",
    "square",
    "dog",
    "runs",
    "what",
    "color",
    "the",
    "question",
    "answer",
    ":",
    ",",
)
SEPARATE: dict[str, Any] = {"decoder": "separate", "decoder_layers": 2}
MakeConfig = Callable[..., ModelConfig]


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., ShardSet]:
    """shards(name, captions, source): an image for each caption; equal numbers are equal images within a source."""

    def write(name: str = "train", captions: Sequence[str] = ("a red circle",) * 4, source: str = "toy") -> ShardSet:
        with ShardWriter(tmp_path / name, source) as writer:
            for number, caption in enumerate(captions):
                asked = [{"question_id": number, "question": "what color?", "answers": ["red"]}]
                writer.write(f"k{number}", b"img", captions=[caption], questions=asked, image_id=number)
        return load_index(tmp_path / name)

    return write


@pytest.fixture
def bert(tmp_path: Path) -> tuple[Path, TextWeights]:
    """A folder as transformers saves it: three layers, 20 positions, a vocabulary of whole words and single characters; and its weights."""
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        "unused",
        *"bcdxyz",
        *(f"##{c}" for c in "bcdxyz"),
    ]
    config = TextConfig(
        vocab_size=len(vocabulary), dim=32, heads=2, layers=3, feed_forward_dim=64, max_positions=20, cross_attention=()
    )
    torch.manual_seed(5)
    transformer, head = TextTransformer(config), VocabularyHead(config)
    for parameter in (*transformer.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter)
    weights = TextWeights(dict(transformer.state_dict()), {}, dict(head.state_dict()))
    folder = tmp_path / "bert"
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in to_bert_state_dict(weights).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    shape = {"vocab_size": len(vocabulary), "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    more = {"intermediate_size": 64, "max_position_embeddings": 20, "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(shape | more))
    return folder, weights


def save(parts: Parts, folder: Path, trained_on: Tensor | None = None) -> str:
    write_checkpoint(folder, parts.config, parts.model, parts.tokenizer.to_json(), {}, trained_on)
    return str(folder)


def equal(one: dict[str, Tensor], other: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if not name.startswith(but or ("-",)))


def test_a_new_model_fits_the_vocabulary_of_its_data(shards: Callable[..., ShardSet], tiny_config: MakeConfig) -> None:
    config = Config(model=tiny_config(text={"vocab_size": 30522, "pad_id": 7}), seed=3)
    sets = [shards(captions=["a red circle left of a square"] * 3)]
    parts = build_parts(config, sets)
    text = parts.config.model.text
    assert text.vocab_size == parts.tokenizer.vocab_size == len(parts.model.text.word_embedding)
    assert text.pad_id == parts.tokenizer.pad_id == 0
    assert parts.tokenizer.decode(parts.tokenizer.encode("red circle answer")) == "red circle answer"
    assert parts.model.config == parts.config.model
    assert equal(parts.model.state_dict(), build_parts(config, sets).model.state_dict())
    other = build_parts(replace(config, seed=4), sets)
    assert not equal(parts.model.state_dict(), other.model.state_dict())


def test_a_checkpoint_says_the_size_of_its_images(shards: Callable[..., ShardSet], tiny_config: MakeConfig) -> None:
    model = replace(tiny_config(), image=ImageConfig(name="test_vit"))
    parts = build_parts(Config(model=model), [shards()])
    assert parts.config.model.image.image_size == parts.model.image_encoder.image_size == 160


def test_init_from_keeps_weights_tokenizer_and_shape(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    before = build_parts(Config(model=tiny_config(first_token={"decoder": 9}, fusion="late")), [shards()])
    folder = save(before, tmp_path / "checkpoint")
    ours = ModelConfig(
        image=ImageConfig(name="test_resnet", frozen=True, trainable_blocks=1, checkpointing=True, drop_path=0.1),
        text=TextConfig(
            dim=768, layers=1, cross_attention=(0,), dropout=0.3, attention_dropout=0.2, checkpointing=True
        ),
        embed_dim=99,
    )
    after = build_parts(Config(model=ours, init_from=folder, seed=8), [shards("other", ["dogs and cats"])])
    assert equal(before.model.state_dict(), after.model.state_dict())
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    saved, built = before.config.model, after.config.model
    taken = {"frozen": True, "trainable_blocks": 1, "checkpointing": True, "drop_path": 0.1, "batch_norm": None}
    assert asdict(built.image) == asdict(saved.image) | taken
    taken = {"dropout": 0.3, "attention_dropout": 0.2, "checkpointing": True}
    assert asdict(built.text) == asdict(saved.text) | taken
    assert replace(built, image=saved.image, text=saved.text) == saved
    assert not any(p.requires_grad for p in after.model.image_encoder.backbone.parameters())
    assert after.model.text.embeddings.dropout.p == 0.3


def test_init_from_changes_the_image_size(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    before = build_parts(Config(model=tiny_config()), [shards()])
    folder = save(before, tmp_path / "checkpoint")
    config = Config(model=replace(tiny_config(), image=ImageConfig(image_size=64)), init_from=folder)
    after = build_parts(config, [])
    position = "image_encoder.backbone.pos_embed"
    assert equal(before.model.state_dict(), after.model.state_dict(), but=(position,))
    assert after.model.state_dict()[position].shape[1] == 1 + 16
    assert after.config.model.image.image_size == after.model.config.image.image_size == 64
    assert after.model.image_encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 64)
    # A checkpoint of it goes on at that size by itself.
    again = build_parts(Config(model=tiny_config(), init_from=save(after, tmp_path / "larger")), [])
    assert again.model.image_encoder.image_size == 32  # asked for by this config
    silent = replace(tiny_config(), image=ImageConfig())
    same = build_parts(Config(model=silent, init_from=str(tmp_path / "larger")), [])
    assert equal(after.model.state_dict(), same.model.state_dict())


def test_a_decoder_is_started_from_the_fusion_layers_or_kept(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    without = build_parts(Config(model=tiny_config()), [shards()])
    folder = save(without, tmp_path / "without")
    started = build_parts(Config(model=tiny_config(**SEPARATE), init_from=folder), [])
    assert started.model.decoder is not None
    for own, fusion in zip(started.model.decoder.layers, without.model.text.layers[2:], strict=True):
        assert equal(own.state_dict(), fusion.state_dict())
    with torch.no_grad():
        for parameter in started.model.decoder.parameters():
            parameter.add_(1.0)
    folder = save(started, tmp_path / "with")
    for model in (tiny_config(**SEPARATE), tiny_config()):  # asked for again, or not spoken of
        kept = build_parts(Config(model=model, init_from=folder), [])
        assert equal(started.model.state_dict(), kept.model.state_dict())
        assert kept.config.model.decoder == "separate"


def test_a_decoder_of_questions_makes_no_captions(shards: Callable[..., ShardSet], tiny_config: MakeConfig) -> None:
    config = Config(model=tiny_config(**SEPARATE, decoder_reads="question"))
    parts = build_parts(config, [shards()])
    for task, weight in (("captioning", 0.0), ("pretraining", 1.0)):
        wrong = replace(parts.config, task=task, objectives=ObjectivesConfig(captioning=weight))
        with pytest.raises(ConfigError, match="captions need a decoder that reads the image"):
            build_task(wrong, parts)
    assert isinstance(build_task(replace(parts.config, task="pretraining"), parts), Pretraining)


def test_text_weights_are_trimmed_to_the_words_that_occur(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, bert: tuple[Path, TextWeights]
) -> None:
    folder, weights = bert
    sets = [shards(captions=["a red circle, a blue square"])]
    more = shards("more", ["the dog runs"])
    config = Config(
        model=tiny_config(text={"layers": 3, "cross_attention": (1, 2), "heads": 4, "dim": 64}),
        text_weights=str(folder),
        tokenizer=TokenizerConfig(trim=True, trim_to=(more.root,)),
        objectives=ObjectivesConfig(captioning=1.0),
    )
    parts = build_parts(config, sets)
    whole, trimmed = Tokenizer.load(folder), parts.tokenizer
    assert trimmed.vocab_size < whole.vocab_size
    for text in ("a red circle, a blue square", "the dog runs", "question: what color answer: red"):
        assert trimmed.tokens(trimmed.encode(text)) == whole.tokens(whole.encode(text))
    assert "unused" not in trimmed.tokens(range(trimmed.vocab_size))
    old = [whole._inner.token_to_id(token) for token in trimmed.tokens(range(trimmed.vocab_size))]
    assert torch.equal(parts.model.text.word_embedding, weights.transformer["embeddings.word.weight"][old])
    for head in (parts.model.masked_language_head, parts.model.language_head):
        assert torch.equal(head.bias, weights.head["bias"][old])
        assert torch.equal(head.transform.weight, weights.head["transform.weight"])
    # Shape and every other tensor are the text weights'.
    assert (parts.config.model.text.dim, parts.config.model.text.heads, parts.config.model.text.max_positions) == (
        32,
        2,
        20,
    )
    for name, tensor in weights.transformer.items():
        if name != "embeddings.word.weight":
            assert torch.equal(parts.model.text.state_dict()[name], tensor), name


def test_fewer_layers_and_positions_than_the_text_weights(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, bert: tuple[Path, TextWeights]
) -> None:
    folder, weights = bert
    text = {"layers": 2, "cross_attention": (1,), "max_positions": 12}
    config = Config(model=tiny_config(text=text, **SEPARATE), text_weights=str(folder))
    parts = build_parts(config, [shards()])
    state = parts.model.text.state_dict()
    taken = {name: tensor for name, tensor in weights.transformer.items() if not name.startswith("layers.2.")}
    assert torch.equal(state["embeddings.position.weight"], taken.pop("embeddings.position.weight")[:12])
    assert all(torch.equal(state[name], tensor) for name, tensor in taken.items())
    assert {name for name in state if name not in weights.transformer} == {n for n in state if "cross_" in n}
    # The decoder too starts from them.
    assert parts.model.decoder is not None
    layer = "layers.1.feed_forward.inner.weight"
    assert torch.equal(parts.model.decoder.state_dict()[layer], weights.transformer[layer])
    with pytest.raises(ConfigError, match=r"model.text.layers=4, but .* has 3; use at most that many"):
        build_parts(Config(model=tiny_config(), text_weights=str(folder)), [shards("again")])


def test_text_weights_need_their_own_tokenizer(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, bert: tuple[Path, TextWeights], tmp_path: Path
) -> None:
    other = build_parts(Config(model=tiny_config()), [shards()]).tokenizer
    other.save(tmp_path / "tokenizer.json")
    config = Config(
        model=tiny_config(text={"layers": 2, "cross_attention": (0, 1)}),
        text_weights=str(bert[0]),
        tokenizer=TokenizerConfig(source=str(tmp_path / "tokenizer.json")),
    )
    with pytest.raises(ConfigError, match="take the tokenizer they came with"):
        build_parts(config, [shards("more")])


def test_what_was_trained_on_is_not_evaluated(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    train, val = shards("train", ["a"] * 6), shards("val", ["b"] * 2)  # images 0 and 1 again
    trained_on = training_images([train], None)
    assert trained_on is not None
    assert len(trained_on) == 6
    assert torch.equal(trained_on, trained_on.sort().values)
    with pytest.raises(UserError, match="2 of its 2 images were trained on"):
        check_held_out(trained_on, val, allow=False)
    check_held_out(trained_on, val, allow=True)
    check_held_out(None, val, allow=False)
    check_held_out(trained_on, shards("elsewhere", ["b"] * 9, "another source"), allow=False)
    # One image in common is enough, also where an earlier task saw it.
    larger = shards("larger", ["c"] * 9)
    with pytest.raises(UserError, match="6 of its 9 images were trained on"):
        check_held_out(trained_on, larger, allow=False)
    folder = save(build_parts(Config(model=tiny_config()), [train]), tmp_path / "checkpoint", trained_on)
    later = training_images([shards("later", ["d"] * 3, "later")], folder)
    assert later is not None
    assert len(later) == 9
    with pytest.raises(UserError, match="2 of its 2 images were trained on"):
        check_held_out(later, val, allow=False)


def test_more_images_than_are_checked_forget_no_earlier_ones(
    shards: Callable[..., ShardSet],
    tiny_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = shards("train", ["a"] * 6)
    folder = save(
        build_parts(Config(model=tiny_config()), [train]), tmp_path / "checkpoint", training_images([train], None)
    )
    monkeypatch.setattr("vlm.held_out.CHECKED_IMAGES", 8)
    later = training_images([shards("later", ["d"] * 9, "later")], folder)
    assert "9 training images, more than 8: nothing will notice" in capsys.readouterr().err
    with pytest.raises(UserError, match="6 of its 6 images were trained on"):
        check_held_out(later, train, allow=False)


def test_a_run_has_the_heads_that_it_trains_and_those_it_started_from(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    contrast = ObjectivesConfig(contrastive=1, matching=0, masked_language=0)
    more = replace(contrast, matching=1, answering=0.5)
    for config, heads in (
        (Config(objectives=contrast), ("contrastive",)),
        (Config(objectives=more), ("contrastive", "matching", "language")),
        (Config(objectives=replace(contrast, self_critical=1.0)), ("contrastive", "language")),
        (Config(task="captioning"), ("language",)),
        (Config(task="captioning", finetune=FinetuneConfig(contrastive=0.1)), ("contrastive", "language")),
        (Config(task="vqa"), ("language",)),
        (Config(task="vqa", vqa=VqaConfig(form="classify")), ("classifier",)),
    ):
        parts = build_parts(replace(config, model=tiny_config()), [shards()], ["red"])
        assert parts.config.model.heads == parts.model.config.heads == heads
        assert (parts.model.matching_head is None) == ("matching" not in heads)
    first = build_parts(Config(model=tiny_config(), objectives=more), [shards()])
    folder = save(first, tmp_path / "first")
    kept = build_parts(Config(model=tiny_config(), init_from=folder, task="captioning"), [])
    assert kept.config.model.heads == ("contrastive", "matching", "language")
    other = build_parts(
        Config(model=tiny_config(), init_from=folder, objectives=replace(contrast, masked_language=1.0)), []
    )
    assert other.config.model.heads == ("contrastive", "matching", "masked_language", "language")


def test_captions_that_do_not_fit_behind_their_prompt_are_refused(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig
) -> None:
    parts = build_parts(Config(model=tiny_config(text={"max_positions": 40})), [shards(captions=["a red circle"] * 4)])
    for prompt in ("", "a red circle"):
        longest = 40 - len(parts.tokenizer.tokens(parts.tokenizer.encode(prompt)[:-1]))
        data, generation = DataConfig(prompt=prompt), GenerationConfig(max_length=longest)
        config = replace(parts.config, task="captioning", data=data, generation=generation)
        build_task(config, parts)
        longer = replace(config, generation=GenerationConfig(max_length=longest + 1))
        for wrong in (longer, replace(longer, task="pretraining", objectives=ObjectivesConfig(captioning=1.0))):
            with pytest.raises(ConfigError, match=rf"use at most generation\.max_length={longest}\."):
                build_task(wrong, parts)
        build_task(replace(longer, task="pretraining", objectives=ObjectivesConfig()), parts)


def test_parts_of_a_batch_that_ranks_cannot_share_are_named(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig
) -> None:
    train = shards()
    parts = build_parts(Config(model=tiny_config()), [train])
    config = replace(parts.config, data=DataConfig(batch_size=64), train=TrainConfig(accumulate=8))
    with pytest.raises(ConfigError, match=r"data\.batch_size=64 in train\.accumulate=8 parts .*use a multiple of 128"):
        training_loader(config, parts, [train], Ranks(0, 16, torch.device("cpu")))


def test_looking_again_needs_the_head_that_looks(shards: Callable[..., ShardSet], tiny_config: MakeConfig) -> None:
    contrast = ObjectivesConfig(contrastive=1, matching=0, masked_language=0)
    for by, objective in (("matching", "matching"), ("captioning", "captioning")):
        retrieval = RetrievalConfig(rerank=4, by=by)  # type: ignore[arg-type]
        config = Config(model=tiny_config(), objectives=contrast, retrieval=retrieval)
        parts = build_parts(config, [shards()])
        with pytest.raises(ConfigError, match=rf"retrieval\.by={by} needs a .* give objectives\.{objective} a weight"):
            build_task(parts.config, parts)
        able = replace(config, objectives=replace(contrast, **{objective: 1.0}))
        parts = build_parts(able, [shards()])
        build_task(parts.config, parts)


def test_the_reward_joins_captioning_and_pretraining(shards: Callable[..., ShardSet], tiny_config: MakeConfig) -> None:
    train = shards()
    parts = build_parts(Config(model=tiny_config()), [train])
    for task, captioning, weights in (
        ("captioning", 0.0, {"self_critical": 1.0}),
        ("captioning", 0.5, {"captioning": 0.25, "self_critical": 1.0}),
        ("pretraining", 0.5, {"captioning": 0.5, "self_critical": 2.0}),
    ):
        objectives = ObjectivesConfig(
            contrastive=0, matching=0, masked_language=0, captioning=captioning, self_critical=2.0
        )
        config = replace(parts.config, task=task, objectives=objectives)  # type: ignore[arg-type]
        assert build_task(config, parts, sets=[train]).weights == weights
    assert build_task(replace(config, task="captioning"), parts).weights == {"captioning": 1.0}  # for evaluation alone


def test_a_split_without_shards_says_which() -> None:
    with pytest.raises(ConfigError, match=r"data.splits.val is empty"):
        load_sets(SplitsConfig().val, "data.splits.val")


def test_each_task_reads_what_it_learns(shards: Callable[..., ShardSet], tiny_config: MakeConfig) -> None:
    data = DataConfig(blank_images=True, max_tokens=20, prompt="a picture of", question_prompt="{question} ->")
    parts = build_parts(Config(model=tiny_config(), data=data), [shards()])
    joint = replace(parts.config, data=replace(data, questions=True, texts_per_image="all"))
    assert isinstance(sample_encoder(joint, parts.tokenizer, 32, training=True), JointEncoder)
    assert isinstance(sample_encoder(joint, parts.tokenizer, 32, training=False), CaptionEncoder)  # for retrieval
    tasks = {"pretraining": Pretraining, "captioning": CaptioningTask, "vqa": PromptedVqa}
    for name, kind in tasks.items():
        config = replace(parts.config, task=name, vqa=VqaConfig(inference="generate"))  # type: ignore[arg-type]
        task = build_task(config, parts)
        assert type(task) is kind
        assert task.blank_images
        for training in (True, False):
            encoder = sample_encoder(config, parts.tokenizer, 32, training)
            assert encoder.pad_id == 0
            if name == "vqa":
                assert isinstance(encoder, QuestionEncoder)
                assert (encoder.form, encoder.question_prompt) == ("prompted", "{question} ->")
            else:
                assert isinstance(encoder, CaptionEncoder)
                assert (encoder.prompt, encoder.max_tokens) == ("a picture of", 20)
                masks = name == "pretraining" and training
                assert encoder.masking_probability == (0.15 if masks else None)
            assert encoder.texts_per_image == ("one" if training else "all")


def test_patches_are_hidden_in_pretraining_only(shards: Callable[..., ShardSet], tiny_config: MakeConfig) -> None:
    objectives = ObjectivesConfig(masked_image=1.0, hidden_unit=16)
    parts = build_parts(Config(model=tiny_config(), objectives=objectives), [shards()])
    encoder, config = parts.model.image_encoder, parts.config
    hiding = image_hiding(config, encoder)
    assert hiding == PatchHiding((2, 2), 1, 0.6)
    for training in (True, False):
        made = sample_encoder(config, parts.tokenizer, 32, training, hiding)
        assert isinstance(made, CaptionEncoder)
        assert made.hiding == (hiding if training else None)
    assert image_hiding(replace(config, task="captioning"), encoder) is None
    assert image_hiding(replace(config, objectives=ObjectivesConfig()), encoder) is None
    with pytest.raises(ConfigError, match=r"objectives\.hidden_unit=32 does not cut 32x32 px .*; use 16\."):
        image_hiding(replace(config, objectives=replace(objectives, hidden_unit=32)), encoder)
    resnet = build_parts(replace(config, model=tiny_config(image="test_resnet")), [shards()])
    for refused in (lambda: image_hiding(config, resnet.model.image_encoder), lambda: build_task(config, resnet)):
        with pytest.raises(ConfigError, match="cannot hide patches of test_resnet"):
            refused()


def test_dropping_patches_is_a_matter_of_the_run(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """A checkpoint that was trained without some goes on with all of them, or the reverse."""
    model = tiny_config()
    dropping = replace(model, image=replace(model.image, patch_drop=0.5))
    for name, before, after, tokens in (("tail", dropping, model, 5), ("start", model, dropping, 3)):
        folder = save(build_parts(Config(model=before), [shards()]), tmp_path / name)
        encoder = build_parts(Config(model=after, init_from=folder), []).model.image_encoder.train()
        assert encoder(torch.zeros(1, 3, 32, 32)).shape[1] == tokens


def test_whole_words_need_a_tokenizer_that_has_them(
    shards: Callable[..., ShardSet], tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = build_parts(Config(model=tiny_config()), [shards()])
    config = replace(parts.config, objectives=ObjectivesConfig(whole_words=True))
    encoder = sample_encoder(config, parts.tokenizer, 32, training=True)
    assert isinstance(encoder, CaptionEncoder)
    assert encoder.whole_words
    monkeypatch.setitem(parts.tokenizer.__dict__, "continuing_ids", frozenset())
    with pytest.raises(ConfigError, match=r"objectives\.whole_words needs a WordPiece tokenizer"):
        sample_encoder(config, parts.tokenizer, 32, training=True)
    sample_encoder(config, parts.tokenizer, 32, training=False)  # nothing is hidden
