"""POPE, whether a model sees objects that are not there: answers to "Is there a ... in the image?" (Li et al. 2023).

Source: the evaluation script of github.com/RUCAIBox/POPE, quirks included: only what comes before the first period is read, and it means no exactly
if one of its words, cut at spaces once the commas are gone, is "No", "no" or "not"; all else means yes ("NO", "nope" and an empty answer too).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vlm.errors import UserError

_NO = frozenset({"No", "no", "not"})


def says_yes(answer: str) -> bool:
    """How the official script reads an answer."""
    return _NO.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))


def pope_scores(labels: Sequence[bool], answers: Sequence[str], subsets: Sequence[str | None]) -> dict[str, Any]:
    """The result by the names of `vlm score vqa`: overall, and perQuestionType for each subset that is not None.

    Each of accuracy, precision, recall, f1 and yes_ratio, in percent, rounded to two digits; "yes" is the positive class. A precision or recall of
    nothing (no yes was said, none was right) is 0, where the official script stops. Raises UserError without questions.
    """
    if not labels:
        raise UserError("No question to score: the annotations are empty.")
    said = [says_yes(answer) for answer in answers]
    groups: defaultdict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for label, yes, subset in zip(labels, said, subsets, strict=True):
        if subset is not None:
            groups[subset].append((label, yes))
    return {
        "overall": _scores(list(zip(labels, said, strict=True))),
        "perQuestionType": {name: _scores(group) for name, group in sorted(groups.items())},
    }


def _scores(pairs: Sequence[tuple[bool, bool]]) -> Mapping[str, float]:
    """Of (label, said yes)."""
    right_yes, labelled, said = (
        sum(label and yes for label, yes in pairs),
        sum(label for label, _ in pairs),
        sum(yes for _, yes in pairs),
    )
    precision, recall = right_yes / max(1, said), right_yes / max(1, labelled)
    shares = {
        "accuracy": sum(label == yes for label, yes in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if right_yes else 0.0,
        "yes_ratio": said / len(pairs),
    }
    return {name: round(100 * share, 2) for name, share in shares.items()}
