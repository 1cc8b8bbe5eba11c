"""The answer to a question about a photograph: python demos/vqa.py IMG "QUESTION" [--model DIR] [--json] [--device D]"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the answer to a question about an image.")
    parser.add_argument("image", metavar="IMG")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--model", default=str(HERE / "model"), metavar="DIR", help="checkpoint folder (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object: image, question, answer, confidence")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    arguments = parser.parse_args()

    from vlm.errors import UserError

    try:
        from vlm.predictor import Predictor

        said = Predictor.load(arguments.model, arguments.device).answer(Path(arguments.image), arguments.question)
    except UserError as error:
        print(f"vqa: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"image": arguments.image, "error": str(error)}, ensure_ascii=False))
        return error.exit_code
    if arguments.json:
        result = {
            "image": arguments.image,
            "question": arguments.question,
            "answer": said.text,
            "confidence": round(said.confidence, 4),
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(said.text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
