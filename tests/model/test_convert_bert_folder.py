"""`vlm convert bert`: a training that starts from its folder has transformers' BERT for a text encoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertLMHeadModel, BertModel

from vlm.build import Parts, build_parts
from vlm.cli import main
from vlm.config import Config, ImageConfig, ModelConfig, TextConfig
from vlm.data.text import Tokenizer, train_wordpiece
from vlm.errors import CheckpointError
from vlm.model.pretrained import load_metadata, load_pretrained, read_weights

TEXTS = ["a red circle left of a blue square", "two dogs run", "how many dogs"]
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])


def bert(kind: type, folder: Path, pickled: bool = False, **changes: Any) -> Any:
    """A tiny random BERT and its folder: safetensors and tokenizer.json, or (pickled) as the first releases, with vocab.txt."""
    tokenizer = train_wordpiece(TEXTS * 2, 100)
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.vocab_size, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    more = {"intermediate_size": 40, "max_position_embeddings": 32, "initializer_range": 0.3}
    model = kind(BertConfig(**shape, **more, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        vocabulary = tokenizer.tokens(range(tokenizer.vocab_size))
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    else:
        tokenizer.save(folder / "tokenizer.json")
    return model


def started(key: str, folder: Path, **settings: Any) -> Parts:
    text = TextConfig(layers=3, cross_attention=(2,))
    model = ModelConfig(image=ImageConfig(name="test_vit", image_size=32), text=text, **settings)
    return build_parts(Config(model=model, **{key: str(folder)}), [])


@PRECISIONS
@pytest.mark.parametrize("key", ["init_from", "text_weights"])
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
@pytest.mark.parametrize("pickled", [False, True])
@torch.no_grad()
def test_a_training_starts_with_transformers_bert(
    kind: type, key: str, pickled: bool, dtype: torch.dtype, tolerance: float, tmp_path: Path, capsys: Any
) -> None:
    reference = bert(kind, tmp_path / "theirs", pickled).to(dtype)
    assert main(["convert", "bert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    headed = kind is not BertModel
    assert "BERT with 3 layers of width 24, " in said
    assert ("masked-language head" in said) == headed
    assert ("pooler" in said, "next-sentence head" in said) == (kind is not BertForMaskedLM, kind is BertForPreTraining)
    parts = started(key, tmp_path / "ours")
    report = capsys.readouterr().err
    assert f"text from {tmp_path / 'ours'}: " in report
    assert "tensors loaded, " in report
    assert " new (layers.2)" in report  # its cross-attention
    model = parts.model.to(dtype).eval()
    tokenizer = Tokenizer.load(tmp_path / "ours")
    assert tokenizer.to_json() == parts.tokenizer.to_json()
    rows = [tokenizer.encode(text) for text in TEXTS]
    mask = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
    ids = torch.tensor([row + [0] * (mask.shape[1] - len(row)) for row in rows])
    states = model.text(model.text.embed(ids), mask)
    inner = reference.bert if headed else reference
    expected = inner(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=tolerance)
    if headed:
        out = reference(ids, attention_mask=mask.long())
        logits = out.logits if kind is BertForMaskedLM else out.prediction_logits
        torch.testing.assert_close(model.masked_language_logits(states)[mask], logits[mask], rtol=0, atol=tolerance)


def test_the_folder_equals_the_source_it_was_made_of(tmp_path: Path, capsys: Any) -> None:
    bert(BertForMaskedLM, tmp_path / "theirs")
    assert main(["convert", "bert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    one, other = (started("text_weights", tmp_path / name) for name in ("theirs", "ours"))
    assert one.config.model == other.config.model
    assert all(torch.equal(t, other.model.state_dict()[name]) for name, t in one.model.state_dict().items())
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert load_metadata(tmp_path / "ours")["task"] == "text"
    assert {name.split(".")[0] for name in read_weights(tmp_path / "ours")} == {"text", "masked_language_head"}


def test_it_is_no_whole_model(tmp_path: Path) -> None:
    bert(BertModel, tmp_path / "theirs")
    main(["convert", "bert", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    with pytest.raises(
        CheckpointError, match="holds a text encoder without an image encoder; start a training from it"
    ):
        load_pretrained(tmp_path / "ours")


def test_what_cannot_be_converted_is_told(tmp_path: Path, capsys: Any) -> None:
    def refused(source: str) -> str:
        assert main(["convert", "bert", str(tmp_path / source), str(tmp_path / "ours")]) == 1
        assert not (tmp_path / "ours").exists()
        message: str = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        return message

    bert(BertModel, tmp_path / "theirs")
    bert(BertLMHeadModel, tmp_path / "decoder", is_decoder=True, add_cross_attention=True)
    capsys.readouterr()
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    assert "no tokenizer here" in refused("theirs")
    train_wordpiece(["other words"], 50).save(tmp_path / "theirs" / "tokenizer.json")
    assert "the files do not belong together" in refused("theirs")
    assert "is a decoder with cross-attention" in refused("decoder")
    assert "config.json does not exist" in refused("nowhere")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "theirs" / "kept")
    torch.save({"weights": torch.nn.Linear(2, 2)}, tmp_path / "theirs" / "pytorch_model.bin")
    message = refused("theirs")
    assert "pytorch_model.bin cannot be read as weights: it names torch.nn" in message


def test_weights_that_are_not_all_those_of_config_json_are_told(tmp_path: Path, capsys: Any) -> None:
    """Nothing may be filled up with random numbers, nor cut, without a word."""
    bert(BertForMaskedLM, tmp_path / "theirs")
    file, settings = tmp_path / "theirs" / "model.safetensors", tmp_path / "theirs" / "config.json"
    whole, said = load_file(file), settings.read_text()

    def refused(changes: dict[str, torch.Tensor | None], **stated: Any) -> str:
        state = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        save_file(state, file, {"format": "pt"})
        settings.write_text(json.dumps(json.loads(said) | stated))
        capsys.readouterr()
        assert main(["convert", "bert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 1
        assert not (tmp_path / "ours").exists()
        message: str = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        return message

    query = "encoder.layer.1.attention.self.query.weight"
    assert f"1 missing ({query}); download" in refused({f"bert.{query}": None})
    assert "1 of another shape (" + query + " (24, 23) instead of (24, 24))" in refused(
        {f"bert.{query}": torch.zeros(24, 23)}
    )
    positions = "embeddings.position_embeddings.weight"
    assert f"({positions} (32, 24) instead of (33, 24))" in refused({}, max_position_embeddings=33)
    head = "cls.predictions.transform.dense.bias"
    assert f"1 missing ({head})" in refused({head: None})
    assert f"({head} (3,) instead of (24,))" in refused({head: torch.zeros(3)})
    message = refused({}, num_hidden_layers=4)
    assert "16 missing (encoder.layer.3.attention.self.query.weight, " in message
    message = refused({}, num_hidden_layers=2)
    assert "16 unexpected (encoder.layer.2." in message
    assert "cannot be used (ConfigError: " in refused({}, num_attention_heads=5)
    assert "holds no word embedding" in refused({"bert.embeddings.word_embeddings.weight": None})


def test_the_word_embedding_may_stand_in_the_head_alone(tmp_path: Path) -> None:
    """It is one tensor under two names, of which files may hold either."""
    bert(BertForMaskedLM, tmp_path / "theirs")
    assert main(["convert", "bert", str(tmp_path / "theirs"), str(tmp_path / "a")]) == 0
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    state["cls.predictions.decoder.weight"] = state.pop("bert.embeddings.word_embeddings.weight")
    save_file(state, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    assert main(["convert", "bert", str(tmp_path / "theirs"), str(tmp_path / "b")]) == 0
    one, other = (read_weights(tmp_path / name) for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
