"""The words of a run that starts anew: its tokenizer, and the text weights and settings that fit it."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlm.config import Config, TextConfig
from vlm.data.index import ShardSet, load_index
from vlm.data.scan import texts
from vlm.data.text import Tokenizer, clean_caption, train_wordpiece, trim
from vlm.errors import ConfigError
from vlm.model.convert.bert import TextWeights, trim_vocabulary
from vlm.model.convert.text_folder import load_text_folder
from vlm.train.report import say


def tokenizer_and_text(config: Config, sets: Sequence[ShardSet]) -> tuple[Tokenizer, TextWeights | None, TextConfig]:
    """The tokenizer, the text weights trimmed to it if any, and the text settings that fit them."""
    text, settings = config.model.text, config.tokenizer
    weights: TextWeights | None = None
    if config.text_weights is not None:
        fields, weights = load_text_folder(config.text_weights)
        if text.layers > fields["layers"]:
            raise ConfigError(
                f"model.text.layers={text.layers}, but {config.text_weights} has {fields['layers']}; use at most that many."
            )
        kept_here = {"layers", "cross_attention", "dropout", "attention_dropout", "checkpointing"}
        text = replace(text, **{k: v for k, v in fields.items() if k not in kept_here and k != "max_positions"})
        text = replace(text, max_positions=min(text.max_positions, fields["max_positions"]))
    source = settings.source or config.text_weights
    if source is None:
        say(f"training a WordPiece vocabulary of at most {settings.vocab_size} tokens on the shards' text")
        return train_wordpiece([*_all_text(config, sets), *_prompts(config)], settings.vocab_size), None, text
    tokenizer = Tokenizer.load(source)
    if settings.trim:
        tokenizer, kept = trim(tokenizer, _all_text(config, sets), settings.min_count, _prompts(config))
        say(f"vocabulary trimmed to {tokenizer.vocab_size} tokens that occur")
        if weights is not None:
            weights = trim_vocabulary(weights, torch.tensor(kept))
    if weights is not None and len(weights.transformer["embeddings.word.weight"]) != tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer.source={source} has {tokenizer.vocab_size} tokens, the text weights another number; take the tokenizer they came with."
        )
    return tokenizer, weights, text


def _all_text(config: Config, sets: Sequence[ShardSet]) -> list[str]:
    """The training shards' distinct texts and those of later tasks, cleaned as the model will see them."""
    more = [load_index(folder, config.data.cache) for folder in config.tokenizer.trim_to]
    return sorted({clean_caption(text) for text in texts([*sets, *more])})


def _prompts(config: Config) -> list[str]:
    return [config.data.prompt, config.data.question_prompt.replace("{question}", " ")]
