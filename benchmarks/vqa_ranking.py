"""Exact ranking of answers by best-first search, beside two others: python benchmarks/vqa_ranking.py --model DIR --shards FOLDER [--answers 3128]

"all": every answer of the list is read, padded to the longest, in batches, the question once. "pruned": BLIP's form (models/blip_vqa.py,
rank_answers), the 128 answers with the likeliest first tokens are read; an answer that begins otherwise cannot win. Winners and scores are compared
with "all" first, in float32; then all are timed in turn. Questions are answered one at a time and in batches, images are encoded beforehand.
Prints a Markdown table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

PRUNED = 128


def main() -> int:
    parser = argparse.ArgumentParser(description="Exact ranking of answers by best-first search, beside two others.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint that answers questions")
    parser.add_argument("--shards", required=True, metavar="FOLDER", help="shards with questions")
    parser.add_argument("--answers", type=int, default=3128, metavar="N", help="of the checkpoint's list (%(default)s)")
    parser.add_argument(
        "--questions",
        type=int,
        default=8,
        metavar="N",
        help="reading the whole list takes seconds each (default: %(default)s)",
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each way, for the median (%(default)s)")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    given = parser.parse_args()
    for name in ("answers", "questions", "runs"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: give at least 1")

    from vlm.errors import UserError

    try:
        for line in report(given):
            print(line, flush=True)
    except UserError as error:
        print(f"vqa_ranking: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def report(given: argparse.Namespace) -> Iterator[str]:
    """Lines to print.

    Raises:
        UserError: the checkpoint answers nothing from a list in the form `prompted`, the list is too short, or there are too few questions.
    """
    import torch

    from vlm.errors import UserError
    from vlm.model.ranking import rank_answers, score_answers
    from vlm.predictor import Predictor
    from vlm.tasks.vqa import answer_tree

    predictor = Predictor.load(given.model, given.device)
    if len(predictor.answers) < given.answers:
        raise UserError(f"{given.model} has a list of {len(predictor.answers)} answers; give --answers at most that.")
    tree, _ = answer_tree(predictor.tokenizer, predictor.answers[: given.answers], predictor.max_answer_tokens)
    tree = tree.to(predictor.model.device)
    images, questions = read_questions(given.shards, given.questions)
    asked = Asked(predictor, images, questions)
    with torch.no_grad():
        full, pruned = score_answers(asked.model, *asked.part(slice(None)), tree), asked.pruned(tree, slice(None))
        for k in (1, 5):
            found = rank_answers(asked.model, *asked.part(slice(None)), tree, k=k)
            best = full.topk(k, dim=1)
            same = sum([r.answer for r in row] == own for row, own in zip(found, best.indices.tolist(), strict=True))
            apart = max(
                abs(r.score - s)
                for row, own in zip(found, best.values.tolist(), strict=True)
                for r, s in zip(row, own, strict=True)
            )
            yield f"k = {k}: the same answers in the same order for {same} of {len(found)} questions, scores at most {apart:.1e} apart"
        same = int((pruned.topk(1).indices == full.topk(1).indices).sum())
        yield f"pruned to {PRUNED}: the same winner for {same} of {len(full)}"
        yield ""
        yield f"| {len(tree)} answers, {len(full)} questions, {asked.model.device} | batch 1, ms a question | batch {len(full)}, ms a question |"
        yield "| --- | --- | --- |"
        ways: dict[str, Callable[[slice], Any]] = {
            "best-first, k = 1": lambda rows: rank_answers(asked.model, *asked.part(rows), tree, k=1),
            "best-first, k = 5": lambda rows: rank_answers(asked.model, *asked.part(rows), tree, k=5),
            f"pruned to {PRUNED}": lambda rows: asked.pruned(tree, rows),
            "all": lambda rows: score_answers(asked.model, *asked.part(rows), tree),
        }
        times = measure(ways, len(full), given.runs)
        for name, (single, batched) in times.items():
            ratios = [f"{times['all'][i] / value:.1f} x" for i, value in enumerate((single, batched))]
            yield f"| {name} | {single:.2f} ({ratios[0]}) | {batched:.2f} ({ratios[1]}) |"


def read_questions(folder: str, count: int) -> tuple[list[bytes], list[str]]:
    """The first questions of the shards, each with its image.

    Raises:
        UserError: there are fewer.
    """
    from vlm.data.index import load_index
    from vlm.data.scan import scan
    from vlm.errors import UserError

    pairs = ((record.image, q["question"]) for record in scan([load_index(folder)]) for q in record.questions)
    found = list(islice(pairs, count))
    if len(found) < count:
        raise UserError(f"{folder} has {len(found)} questions; --questions {count} were asked for.")
    return [image for image, _ in found], [question for _, question in found]


class Asked:
    """Questions with the memories of their images, ready to be answered by a model in the form `prompted`."""

    def __init__(self, predictor: Any, images: list[bytes], questions: list[str]) -> None:
        import torch

        from vlm.data.collate import pad
        from vlm.data.images import decode_image

        self.model = predictor.model
        pixels = torch.stack([predictor.transform(decode_image(image)) for image in images]).to(self.model.device)
        with torch.no_grad():
            tokens = torch.cat([self.model.encode_image(part).tokens for part in pixels.split(16)])
            self.memory = self.model.memory(tokens, None, "decoder")
        ids, mask = pad(
            [predictor._answerer.prompt_ids(question) for question in questions], predictor.tokenizer.pad_id
        )
        self.ids, self.mask = ids.to(self.model.device), mask.to(self.model.device)

    def part(self, rows: slice) -> tuple[Any, Any, Any]:
        """Memory, ids and mask of some questions, no longer than the longest of them."""
        import torch

        chosen = torch.arange(len(self.ids), device=self.ids.device)[rows]
        length = int(self.mask[rows].sum(1).max())
        return self.memory.select(chosen), self.ids[rows, :length], self.mask[rows, :length]

    def pruned(self, tree: Any, rows: slice) -> Any:
        """Scores (B, A) of the answers whose first token is among the likeliest, -inf for the others."""
        import torch

        from vlm.model.generation import exact_logits, read_prompt

        memory, ids, mask = self.part(rows)
        logits, cache = read_prompt(self.model, memory, ids, mask, tree.path.shape[1])
        first = logits.log_softmax(1)
        leaves = (tree.answer >= 0).nonzero().squeeze(1)
        nodes = torch.empty_like(leaves)
        nodes[tree.answer[leaves]] = leaves
        _, chosen = first[:, tree.path[nodes, 0]].topk(min(PRUNED, len(tree)), dim=1)  # (B, 128)
        picked = nodes[chosen.flatten()]
        length = int(tree.depth[picked].max())
        path, depth = tree.path[picked, :length], tree.depth[picked]
        prompts = torch.arange(len(ids), device=ids.device).repeat_interleave(chosen.shape[1])
        inside = torch.arange(length, device=ids.device) < depth[:, None]
        states = self.model.decode_states(path, memory, inside, cache.select(prompts))
        after = exact_logits(self.model, states).log_softmax(2)
        targets = torch.cat([path, path.new_full((len(path), 1), tree.end_id)], dim=1)
        values = torch.cat([first[prompts][:, None], after], dim=1).gather(2, targets[..., None]).squeeze(2)
        counted = torch.arange(length + 1, device=ids.device) <= depth[:, None]
        scores = values.masked_fill(~counted, 0.0).sum(1).view_as(chosen)
        return torch.full((len(ids), len(tree)), -torch.inf, device=ids.device).scatter_(1, chosen, scores)


def measure(ways: dict[str, Callable[[slice], Any]], count: int, runs: int) -> dict[str, tuple[float, float]]:
    """Medians in milliseconds a question, one at a time (the first eight) and all together; the ways in turn."""
    import torch

    def seconds(act: Callable[[slice], Any], parts: list[slice]) -> float:
        start = time.perf_counter()
        for part in parts:
            act(part)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    single = [slice(i, i + 1) for i in range(min(8, count))]
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for run in range(runs + 1):
        for name, act in ways.items():
            values = (seconds(act, single) / len(single), seconds(act, [slice(None)]) / count)
            if run:  # the first warms up
                for kept, value in zip(taken[name], values, strict=True):
                    kept.append(1000 * value)
    return {name: (statistics.median(one), statistics.median(many)) for name, (one, many) in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
