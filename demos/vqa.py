"""The answer to a question about a photograph: python demos/vqa.py IMG "QUESTION" [--model DIR] [--json] [--device D] [--int8]"""

import argparse
import json
import sys

from caption import MODEL, load


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the answer to a question about an image.")
    parser.add_argument("image", metavar="IMG")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object: image, question, answer, confidence")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--int8", action="store_true", help="weights of 8 bits, in less memory; needs torchao")
    arguments = parser.parse_args()
    if not arguments.question.strip():
        parser.error("QUESTION is empty")

    from vlm.errors import BadImage, UserError

    try:
        said = load(arguments.model, arguments.device, arguments.int8).answer(arguments.image, arguments.question)
    except UserError as error:
        print(f"vqa: {error}", file=sys.stderr)
        if arguments.json and isinstance(error, BadImage):
            print(json.dumps({"image": arguments.image, "error": str(error)}))
        return error.exit_code
    if arguments.json:
        names = {"image": arguments.image, "question": arguments.question}
        print(json.dumps({**names, "answer": said.text, "confidence": round(said.confidence, 4)}))
    else:
        print(said.text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)
