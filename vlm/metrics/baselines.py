"""What counting alone reaches in VQA: the baselines that a model which looks at the picture must beat."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlm.metrics.vqa import normalize_answer


def majority_answer(answers: Iterable[str]) -> str:
    """The most frequent answer after the official normalisation; of equally frequent ones the alphabetically first.

    Answers that are empty once normalised do not count. Raises ValueError where no other is left.
    """
    counts = Counter(normalize_answer(answer) for answer in answers)
    del counts[""]
    if not counts:
        raise ValueError("no answer to count: the answers are none, or empty after normalisation.")
    return min(counts, key=lambda answer: (-counts[answer], answer))


def question_type(question: str, words: int = 2) -> str:
    """The first words of a question in lower case, the question's type: 'How many dogs are there?' -> 'how many'."""
    return " ".join(question.lower().replace("?", " ").split()[:words])


@dataclass(frozen=True)
class QuestionTypeBaseline:
    """Answers a question by its first words: "how many ..." -> "2". The picture is never looked at."""

    overall: str
    """The most frequent training answer: the plain majority baseline, and what an unknown type gets."""
    by_type: Mapping[str, str]
    """First words, as many as `words` and fewer -> most frequent training answer."""
    words: int

    def answer(self, question: str) -> str:
        """By the longest beginning that training had, else the overall majority."""
        for words in range(self.words, 0, -1):
            if (found := self.by_type.get(question_type(question, words))) is not None:
                return found
        return self.overall


def fit_question_type_baseline(
    questions: Sequence[str], answers: Sequence[Sequence[str]], words: int = 2
) -> QuestionTypeBaseline:
    """Count the training split: questions, and of each the answers of all its annotators (one or several)."""
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions but answers to {len(answers)}; give one list of answers each.")
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for question, given in zip(questions, answers, strict=True):
        kept = [answer for answer in given if normalize_answer(answer)]
        for beginning in {question_type(question, count) for count in range(1, words + 1)}:
            groups[beginning].extend(kept)
    return QuestionTypeBaseline(
        overall=majority_answer(answer for given in answers for answer in given),
        by_type={beginning: majority_answer(group) for beginning, group in groups.items() if group},
        words=words,
    )
