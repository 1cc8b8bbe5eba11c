"""Folders of transformers' BERT as text weights of ours: `vlm convert bert`.

The result is a checkpoint folder that holds a text encoder only: its weights under our names, its tokenizer, its settings. A training starts from it
with `init_from` or `text_weights`, which mean the same for it; nothing else can be done with it, as it has no image encoder.
"""

from pathlib import Path

from vlm.convert import Converted, refuse_existing
from vlm.data.text import Tokenizer
from vlm.errors import CheckpointError
from vlm.model.convert.bert import load_bert_folder
from vlm.model.convert.text_folder import HEAD, TEXT
from vlm.model.pretrained import TEXT_ONLY, replacing_folder, save_pretrained


def convert_bert(source: Path, target: Path, named: str = "") -> Converted:
    """Writes `target` from a folder as transformers saves BertModel, BertForMaskedLM or BertForPreTraining, or sentence-transformers its MiniLM.

    Kept: embeddings, layers and, where there is one, the masked-language head. Pooler and next-sentence head have no use here.
    named: what the card calls `source`, where that is a download.

    Raises:
        CheckpointError: `source` is incomplete, or is no such BERT. UserError: `target` exists or cannot be written, or there is no tokenizer.
    """
    refuse_existing(target)
    fields, weights = load_bert_folder(source)
    if fields.pop("cross_attention"):
        raise CheckpointError(f"{source} is a decoder with cross-attention; convert a BERT that reads text alone.")
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size != fields["vocab_size"]:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {fields['vocab_size']}; the files do not belong together."
        )
    state = {f"{TEXT}{name}": tensor for name, tensor in weights.transformer.items()}
    state |= {f"{HEAD}{name}": tensor for name, tensor in weights.head.items()}
    metadata = {"task": TEXT_ONLY, "model": {"text": fields, "heads": ["masked_language"] if weights.head else []}}
    card = "\n".join(
        (
            *("---", "library_name: vlm", "---", f"# {target.name}", ""),
            f"A text encoder, converted from transformers' BERT in `{named or source}`; its licence and data are those of its source.",
            *("", f"    vlm train CONFIG --init-from {target}", ""),
        )
    )
    with replacing_folder(target) as new:
        save_pretrained(state, new, metadata, tokenizer.to_json(), card)
    parts = {"pooler": "pooler.", "next-sentence head": "cls.seq_relationship."}
    left_out = tuple(
        what for what, prefix in parts.items() if any(name.startswith(prefix) for name in weights.left_out)
    )
    name = f"BERT with {fields['layers']} layers of width {fields['dim']}, {fields['vocab_size']} tokens"
    return Converted(name + (" and a masked-language head" if weights.head else ""), left_out)
