"""What PyYAML lets pass in a config and would lose without a word."""

from pathlib import Path

import pytest

from vlm.errors import ConfigError
from vlm.settings import load_config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def refused(path: Path, text: str) -> str:
    """What is said of a file with this text."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {workers: 0}\ntask: vqa\ndata: {flip: false}", "line 3: data is given again, first in line 1;"),
        ("data:\n  workers: 0\n  flip: false\n  workers: 1", "line 4: workers is given again, first in line 2;"),
        ('model: {text: {dim: 96, "dim": 48}}', "line 1: dim is given again, first in line 1;"),
        ("model: {text: &t {dim: 96}}\nvqa: {<<: *t, <<: *t, form: a, form: b}", "line 2: form is given again"),
        ("- {a: 1}\n- {a: 1, b: 2, a: 1}", "line 2: a is given again"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(path: Path, text: str, said: str) -> None:
    message = refused(path, text)
    assert message.startswith(f"{path}: {said}")
    assert "\n" not in message


def test_a_base_that_gives_a_key_twice_is_named(path: Path, tmp_path: Path) -> None:
    path.write_text("base: base.yaml\nseed: 3")
    (tmp_path / "base.yaml").write_text("seed: 1\nseed: 2")
    with pytest.raises(ConfigError, match=r"base\.yaml: line 2: seed is given again, first in line 1"):
        load_config(path)


def test_merge_keys_and_anchors_bring_in_what_may_be_given_again(path: Path) -> None:
    path.write_text(
        "data: {splits: {train: &these [a, b], val: *these}}\n"
        "model:\n"
        "  text: &text\n"
        "    <<: {dim: 96, heads: 4}\n"
        "    heads: 8\n"
    )
    config = load_config(path)
    assert config.data.splits.train == config.data.splits.val == ("a", "b")
    assert (config.model.text.dim, config.model.text.heads) == (96, 8)


def test_what_was_merged_may_be_merged_again(path: Path) -> None:
    """PyYAML makes the outer mapping first, and merges into the inner one for it."""
    path.write_text("data: {cache: &inner {<<: {a: 1}, a: 2}}\nfurther: {<<: *inner, a: 3}")
    with pytest.raises(ConfigError, match=r"unknown setting data\.cache\.a"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "data: {splits: {train: o/c1/train}}",
            "data.splits.train = 'o/c1/train': expected a list, e.g. [o/c1/train].",
        ),
        ("model: {text: {cross_attention: 4}}", "model.text.cross_attention = 4: expected a list."),
        ("data: {splits: {train: null}}", "data.splits.train = None: expected a list."),
    ],
)
def test_a_single_value_where_a_list_is_wanted(path: Path, text: str, said: str) -> None:
    assert refused(path, text) == f"{path}: {said}"
