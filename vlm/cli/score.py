"""The command `vlm score`: thin, no logic."""

import argparse
import json
from pathlib import Path
from typing import Any

from vlm.cli.convert import Commands
from vlm.errors import ConfigError


def add_score(commands: Commands) -> None:
    """Adds it to the command's parser."""
    score = commands.add_parser("score", help="score a prediction file in the official form").add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    vqa = score.add_parser("vqa", help="official VQA accuracy")
    vqa.add_argument("--questions", type=Path, required=True, metavar="Q.json")
    vqa.add_argument("--annotations", type=Path, required=True, metavar="A.json")
    rules = vqa.add_mutually_exclusive_group()
    rules.add_argument(
        "--rules",
        choices=("vqa", "textvqa", "vizwiz"),
        default="vqa",
        help="whose official evaluator: they normalise answers differently (default: vqa)",
    )
    rules.add_argument(
        "--without-quirks",
        dest="rules",
        action="store_const",
        const="plain",
        help="normalise all answers alike, which the official evaluator does not; not the number that papers give",
    )
    captions = score.add_parser(
        "captions", help="BLEU, ROUGE-L, CIDEr as pycocoevalcap; METEOR and SPICE where Java is"
    )
    captions.add_argument("--references", type=Path, required=True, metavar="R.json")
    captions.add_argument(
        "--document-frequencies",
        type=Path,
        metavar="R.json",
        help="references whose images say how rare an n-gram is, for CIDEr (default: those of --references, as papers do)",
    )
    captions.add_argument("--meteor", action="store_true", help="METEOR too; needs Java and pycocoevalcap")
    captions.add_argument(
        "--spice", action="store_true", help="SPICE too; needs Java, pycocoevalcap and its language models"
    )
    captions.add_argument(
        "--image-text-score",
        metavar="MODEL",
        help="how well captions and images fit by this checkpoint's embeddings, 2.5 x max(cosine, 0); never compare it across checkpoints",
    )
    captions.add_argument("--images", type=Path, metavar="FOLDER", help="the images, for --image-text-score")
    pope = score.add_parser("pope", help="accuracy, precision, recall, F1 and share of yes, as POPE")
    pope.add_argument("--annotations", type=Path, required=True, metavar="A.json", help="VQA's form or POPE's")
    for kind in (vqa, captions, pope):
        kind.add_argument("--predictions", type=Path, required=True, metavar="P.json")
    retrieval = score.add_parser("retrieval", help="recall at 1, 5 and 10 of a matrix of similarities")
    retrieval.add_argument(
        "--similarity",
        type=Path,
        required=True,
        metavar="S.npy",
        help="an image a row, a text a column, higher is more alike (.npz: the array `similarity`)",
    )
    retrieval.add_argument(
        "--images-of-texts",
        type=Path,
        metavar="ROWS.json",
        help="a list, the row of each text's image (default: equally many texts an image, one image's after the other's)",
    )
    for kind in (vqa, captions, pope, retrieval):
        kind.add_argument("--json", action="store_true", help="print one JSON object")
        kind.set_defaults(run=_score)


def _score(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.metrics.files import format_scores

    scores = {"vqa": _vqa, "captions": _captions, "pope": _pope, "retrieval": _retrieval}[arguments.kind](arguments)
    print(json.dumps(scores) if arguments.json else format_scores(scores))  # noqa: T201
    return 0


def _vqa(arguments: argparse.Namespace) -> dict[str, Any]:
    from vlm.metrics.score import score_vqa

    return score_vqa(arguments.questions, arguments.annotations, arguments.predictions, arguments.rules)


def _captions(arguments: argparse.Namespace) -> dict[str, Any]:
    from vlm.metrics.score import score_captions, score_image_text

    if (arguments.image_text_score is None) != (arguments.images is None):
        raise ConfigError("--image-text-score MODEL and --images FOLDER go together: give both.")
    references, predictions = arguments.references, arguments.predictions
    scores = score_captions(references, predictions, arguments.document_frequencies, arguments.meteor, arguments.spice)
    if arguments.image_text_score is not None:
        from vlm.predictor import Predictor

        predictor = Predictor.load(arguments.image_text_score)
        scores |= score_image_text(predictor, references, predictions, arguments.images)
    return scores


def _pope(arguments: argparse.Namespace) -> dict[str, Any]:
    from vlm.metrics.score import score_pope

    return score_pope(arguments.annotations, arguments.predictions)


def _retrieval(arguments: argparse.Namespace) -> dict[str, Any]:
    from vlm.metrics.score import score_retrieval

    return score_retrieval(arguments.similarity, arguments.images_of_texts)
