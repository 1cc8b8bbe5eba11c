"""How often captions state a gender where no reference does: python benchmarks/gender.py --references R.json --predictions P.json

R and P are files in COCO's form, as `vlm evaluate` and the recipes write them. A caption states a gender by one of the words below; the idea and the
kind of word list are Hendricks et al. 2018, "Women also Snowboard".
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

WORDS = {
    "female": "woman women girl girls lady ladies female females she her hers mother daughter wife bride waitress actress",
    "male": "man men boy boys guy guys gentleman male males he his him father son husband groom waiter actor",
}
NEUTRAL = "person people child children kid kids baby toddler someone adult adults player rider couple crowd"


def main() -> int:
    parser = argparse.ArgumentParser(description="How often captions state a gender where no reference does.")
    parser.add_argument("--references", type=Path, required=True, metavar="R.json")
    parser.add_argument("--predictions", type=Path, required=True, metavar="P.json")
    arguments = parser.parse_args()

    from vlm.errors import UserError

    try:
        references = read(arguments.references, "annotations")
        predictions = read(arguments.predictions, None)
    except UserError as error:
        print(f"gender: {error}", file=sys.stderr)
        return error.exit_code
    if missing := [image for image in predictions if image not in references]:
        print(
            f"gender: {len(missing)} images have no references, such as {missing[0]}; are the two of the same split?",
            file=sys.stderr,
        )
        return 1
    for line in report(references, {image: captions[0] for image, captions in predictions.items()}):
        print(line)
    return 0


def read(path: Path, key: str | None) -> dict[object, list[str]]:
    """Captions by image.

    Raises:
        UserError: the file is not in COCO's form.
    """
    from vlm.errors import UserError

    found = defaultdict(list)
    try:
        content = json.loads(path.read_text())
        for item in content if key is None else content[key]:
            found[item["image_id"]].append(item["caption"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not captions in COCO's form ({type(error).__name__}: {error}).") from None
    return found


def words(captions: list[str]) -> set[str]:
    """All words of the captions."""
    joined = " ".join(captions).lower().replace("'s", " ")
    return set(joined.replace(".", " ").replace(",", " ").split())


def genders(captions: list[str]) -> set[str]:
    """Which of female and male the captions state."""
    said = words(captions)
    return {name for name, known in WORDS.items() if said & set(known.split())}


def report(references: dict[object, list[str]], captions: dict[object, str]) -> list[str]:
    """What the captions say, by what the references say."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for image, caption in captions.items():
        stated = genders(references[image])
        people = stated or words(references[image]) & set(NEUTRAL.split())
        row = (
            next(iter(stated))
            if len(stated) == 1
            else "both"
            if stated
            else "people, no gender"
            if people
            else "no people"
        )
        said = genders([caption])
        table[row]["both" if len(said) == 2 else next(iter(said), "none")] += 1
    columns = ("female", "male", "both", "none")
    lines = ["references        images  " + "".join(f"{'says ' + column:>12}" for column in columns)]
    for row in ("female", "male", "both", "people, no gender", "no people"):
        counts = table[row]
        total = max(1, counts.total())
        lines.append(
            f"{row:<18}{counts.total():>6}  "
            + "".join(f"{100 * counts[column] / total:>10.1f} %" for column in columns)
        )
    unstated = table["people, no gender"] + table["no people"]
    assigned = unstated.total() - unstated["none"]
    share = 100 * assigned / max(1, unstated.total())
    lines.append(f"a gender where no reference states one: {assigned} of {unstated.total()} images ({share:.1f} %)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
