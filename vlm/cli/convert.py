"""The command `vlm convert`: thin, no logic."""

import argparse
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_convert(commands: Commands) -> None:
    """Adds it to the command's parser."""
    convert = commands.add_parser("convert", help="other libraries' checkpoints and back").add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    blip = convert.add_parser(
        "blip",
        help="transformers' BLIP -> a checkpoint folder",
        description="Make a checkpoint folder of transformers' BLIP, in a folder or on the hub: BlipForConditionalGeneration (captions), "
        "BlipForQuestionAnswering, BlipForImageTextRetrieval or BlipModel.",
    )
    blip.add_argument("--prompt", default="", help="words that every caption continues, e.g. 'a picture of '")
    to_blip = convert.add_parser(
        "to-blip",
        help="a checkpoint folder -> transformers' BLIP",
        description="Make a folder that transformers reads of a checkpoint folder with BLIP's structure; its task says which class.",
    )
    bert = convert.add_parser(
        "bert",
        help="transformers' BERT -> text weights to start from",
        description="Make a folder of text weights of transformers' BERT, in a folder or on the hub (BertModel, BertForMaskedLM, "
        "BertForPreTraining, MiniLM): the text encoder and, where there is one, the masked-language head, under this library's names, with the "
        "tokenizer. It has no image encoder, so it captions nothing: a training starts from it, with --init-from or --text-weights.",
    )
    to_blip.add_argument("source", type=Path, metavar="SRC", help="the folder to read")
    for kind in (blip, bert):
        kind.add_argument(
            "source",
            metavar="SRC",
            help="the folder to read, or a model's name on the hub (owner/name) where there is no such folder",
        )
        kind.add_argument("--revision", help="of a model on the hub: branch, tag or commit")
    albef = convert.add_parser(
        "albef",
        help="the ALBEF authors' .pth -> a checkpoint folder",
        description="Make a checkpoint folder of a file of ALBEF's authors: pretraining (ALBEF.pth), retrieval, visual grounding or VQA. Kind and "
        "sizes are told from its tensors; nothing in it is run.",
    )
    original = convert.add_parser(
        "blip-original",
        help="the BLIP authors' .pth -> a checkpoint folder",
        description="Make a checkpoint folder of a file of BLIP's authors: pretraining (model_base.pth), captioning, VQA or retrieval, base or "
        "large. Kind and sizes are told from its tensors; nothing in it is run.",
    )
    original.add_argument(
        "--prompt",
        default="a picture of ",
        help="words that every caption of a captioning model continues (default: '%(default)s')",
    )
    for kind in (albef, original):
        kind.add_argument("source", type=Path, metavar="SRC.pth", help="the file to read")
        kind.add_argument(
            "--tokenizer",
            type=Path,
            metavar="DIR|vocab.txt",
            help="bert-base-uncased's vocabulary, which the file does not hold: vocab.txt, tokenizer.json or a folder with one; needed",
        )
        kind.add_argument(
            "--keep-momentum",
            action="store_true",
            help="keep the momentum copies and the queue: a pretraining with a teacher that starts from DST starts with them",
        )
    for kind in (blip, to_blip, bert, albef, original):
        kind.add_argument("target", type=Path, metavar="DST", help="the folder to write; must not exist")
        kind.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace, _: list[str]) -> int:
    source, target = arguments.source, arguments.target
    if arguments.kind in ("blip", "bert"):
        from vlm.convert import refuse_existing
        from vlm.hub import source_folder

        refuse_existing(target)  # before a download
        source = source_folder(source, arguments.revision)
    if arguments.kind == "blip":
        from vlm.convert import convert_blip

        done = convert_blip(source, target, arguments.prompt, arguments.source)
    elif arguments.kind == "to-blip":
        from vlm.convert import convert_to_blip

        done = convert_to_blip(source, target)
    elif arguments.kind == "bert":
        from vlm.convert.bert import convert_bert

        done = convert_bert(source, target, arguments.source)
    else:
        from vlm.convert.authors import ALBEF, BLIP, convert_original

        family, more = (ALBEF, {}) if arguments.kind == "albef" else (BLIP, {"prompt": arguments.prompt})
        done = convert_original(
            family, source, target, arguments.tokenizer, keep_momentum=arguments.keep_momentum, **more
        )
    left_out = f"; left out: {', '.join(done.left_out)}" if done.left_out else ""
    print(f"{target}: {done.name}{left_out}")  # noqa: T201
    return 0
