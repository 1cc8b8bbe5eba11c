"""`vlm score`: official files in, official numbers or one clear line out."""

import json

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.metrics.files import format_scores
from vlm.metrics.score import score_captions, score_pope, score_retrieval, score_vqa

REFERENCES = {
    "images": [{"id": 2}, {"id": 1}, {"id": 3}],
    "annotations": [
        {"image_id": 1, "id": 11, "caption": "A cat sits on the mat."},
        {"image_id": 1, "id": 12, "caption": "There is a cat on a mat"},
        {"image_id": 2, "id": 13, "caption": "a man rides a red bike"},
    ],
}
CAPTIONS = [{"image_id": 2, "caption": "A man rides a bicycle!"}, {"image_id": 1, "caption": "a cat on the mat"}]
QUESTIONS = {"questions": [{"question_id": 5, "image_id": 1, "question": "Is it?"}]}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 5,
            "question_type": "is it",
            "answer_type": "yes/no",
            "answers": [{"answer": "yes", "answer_id": n} for n in range(2)]
            + [{"answer": f"no{n}", "answer_id": n} for n in range(8)],
        }
    ]
}
ANSWERS = [{"question_id": 5, "answer": "Yes!"}]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_vqa_files(write):
    paths = [write("q", QUESTIONS), write("a", ANNOTATIONS), write("p", ANSWERS)]
    expected = {"overall": 60.0, "perAnswerType": {"yes/no": 60.0}, "perQuestionType": {"is it": 60.0}}
    assert score_vqa(*paths) == score_vqa(*map(str, paths)) == expected
    assert json.loads(json.dumps(expected)) == expected


def test_caption_files(write):
    scores = score_captions(write("r", REFERENCES), write("p", CAPTIONS))
    assert list(scores) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    # [ran pycocoevalcap 1.2 with Java 17 on these two images]
    expected = [0.7368576776, 0.7265514683, 0.6604818250, 0.4927945901, 0.8049853372, 4.6870443192]
    assert list(scores.values()) == pytest.approx(expected, abs=1e-6)
    bare = {"annotations": REFERENCES["annotations"]}  # the list of images only gives the order
    assert score_captions(write("r", bare), write("p", CAPTIONS[::-1])) == pytest.approx(scores)


def test_captions_are_tokenized_in_the_order_of_the_list_of_images(write):
    # As pycocoevalcap: "K." loses its period where a sentence begins in the next caption of the same file.
    images = {1: "reads K.", 2: "The man", 3: "a dog"}
    annotations = [{"image_id": key, "caption": caption} for key, caption in images.items()]
    predictions = write("p", [{"image_id": 1, "caption": "reads k"}, *annotations[1:]])

    def exact(order):
        files = write("r", {"images": [{"id": key} for key in order], "annotations": annotations}), predictions
        return score_captions(*files)["Bleu_1"] == pytest.approx(1, abs=1e-6)

    assert exact([1, 2, 3])
    assert not exact([1, 3, 2])


def test_files_are_utf8_with_or_without_a_mark(write):
    references = {"annotations": [{"image_id": 1, "caption": "caf\u00e9 na\u00efve"}]}
    text = json.dumps(references, ensure_ascii=False)
    predictions = write("p", [{"image_id": 1, "caption": "caf\u00e9 na\u00efve"}])
    for content in (text, "\ufeff" + text):
        assert score_captions(write("r", content), predictions)["ROUGE_L"] == pytest.approx(1)


def test_tables():
    vqa = {"overall": 60.0, "perAnswerType": {"yes/no": 100.0}, "perQuestionType": {"is the": 7.5}}
    assert format_scores(vqa).splitlines() == [
        "overall           60.00",
        "perAnswerType",
        "  yes/no         100.00",
        "perQuestionType",
        "  is the           7.50",
    ]
    assert format_scores({"Bleu_1": 0.5, "CIDEr": 1.23456}).splitlines() == ["Bleu_1    0.5000", "CIDEr     1.2346"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\u00e9", "not JSON"),
        ("5", r"not of the expected form \[\{"),
        ("[5]", "not of the expected form"),
        ('{"predictions": []}', "not of the expected form"),
        ("[]", "without"),
        ('[{"image_id": 1, "question_id": 5}]', "lacks an image_id or a caption|answer is None"),
        ('[{"image_id": [1], "question_id": [5], "caption": "x", "answer": "x"}]', "lacks an image_id|record 0"),
        (json.dumps(CAPTIONS + CAPTIONS[:1]), r"1 further caption \(2\)|record 0"),
    ],
)
@pytest.mark.parametrize("what", ["vqa", "captions"])
def test_unusable_predictions_give_one_clear_line(write, content, message, what):
    predictions = write("p.json", content)
    files = [write("q", QUESTIONS), write("a", ANNOTATIONS)] if what == "vqa" else [write("r", REFERENCES)]
    score = score_vqa if what == "vqa" else score_captions
    with pytest.raises(UserError, match=message) as caught:
        score(*files, predictions)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_cannot_be_read_are_named(write, tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file; expected a JSON file of the form"):
        score_captions(tmp_path / "none.json", write("p", CAPTIONS))
    with pytest.raises(UserError, match="cannot be read"):
        score_captions(tmp_path, write("p", CAPTIONS))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary: not JSON"):
        score_captions(tmp_path / "binary", write("p", CAPTIONS))


@pytest.mark.parametrize("content", [[], {"images": []}, {"annotations": {}}, {"annotations": [{"image_id": 1}]}])
def test_references_of_another_form_are_refused(write, content):
    with pytest.raises(UserError, match="expected"):
        score_captions(write("r", content), write("p", CAPTIONS))


def test_questions_and_annotations_in_each_others_place(write):
    paths = [write("a", ANNOTATIONS), write("q", QUESTIONS), write("p", ANSWERS)]
    with pytest.raises(UserError, match=r'a: not of the expected form \{"questions"'):
        score_vqa(*paths)


def test_cider_with_other_document_frequencies(write):
    references, predictions = write("r", REFERENCES), write("p", CAPTIONS)
    usual = score_captions(references, predictions)
    assert score_captions(references, predictions, references) == pytest.approx(usual)
    more = {"image_id": 9, "caption": "a man and a dog"}
    corpus = write("d", {"annotations": [*REFERENCES["annotations"], more]})
    other = score_captions(references, predictions, corpus)
    assert other.pop("CIDEr") != pytest.approx(usual["CIDEr"])
    assert other == pytest.approx({name: value for name, value in usual.items() if name != "CIDEr"})
    with pytest.raises(UserError, match="d: no captions"):
        score_captions(references, predictions, write("d", {"annotations": []}))


def test_vqa_without_quirks(write):
    annotations = {
        "annotations": [{"question_id": 5, "answers": [{"answer": "yes", "answer_id": n} for n in range(10)]}]
    }
    paths = [write("q", QUESTIONS), write("a", annotations), write("p", ANSWERS)]
    assert [score_vqa(*paths, rules)["overall"] for rules in ("vqa", "plain")] == [0, 100]


ROWS = np.array([[0.9, 0.1, 0.2, 0.8], [0.3, 0.95, 0.4, 0.5]], dtype=np.float32)


@pytest.mark.parametrize("form", ["npy", "npz"])
def test_retrieval_files(tmp_path, write, form):
    path = tmp_path / f"s.{form}"
    np.save(path, ROWS) if form == "npy" else np.savez(path, similarity=ROWS)
    scores = score_retrieval(path)  # texts 0 and 1 are of image 0, 2 and 3 of image 1
    assert scores == pytest.approx(
        {"TR_R@1": 50, "TR_R@5": 100, "TR_R@10": 100, "IR_R@1": 50, "IR_R@5": 100, "IR_R@10": 100}
        | {"mean_R@1": 50, "images": 2, "texts": 4}
    )
    scores = score_retrieval(path, write("rows.json", [0, 1, 1, 0]))
    assert (scores["TR_R@1"], scores["IR_R@1"]) == (100, 100)
    assert "IR_R@10   100.00" in format_scores(scores)
    assert "texts          4" in format_scores(scores)


@pytest.mark.parametrize(
    ("content", "rows", "message"),
    [
        (b"no array", None, r"s\.npy: cannot be read \(.*\); expected \.npy with an array \(images, texts\)"),
        (b"", None, "cannot be read"),
        (b"PK\x03\x04 cut short", None, "cannot be read"),
        (np.array([[1, None]]), None, "cannot be read"),  # of Python objects: would be unpickled
        (np.zeros(3), None, r"shape \(3,\) of float64, expected numbers of shape \(images, texts\)"),
        (np.array([["a"]]), None, "expected numbers"),
        (np.zeros((0, 3)), None, "cannot be read|expected numbers"),
        (np.array([[1.0, np.nan]]), None, "NaN in image rows 0 to 0"),
        (np.zeros((3, 2)), None, "2 texts of 3 images.*--images-of-texts.*transposed"),
        (np.zeros((2, 5)), None, "5 texts of 2 images"),
        (np.zeros((2, 3)), [0, 1], "2 rows for the 3 texts"),
        (np.zeros((3, 3)), [0, 1, 7], r"rows\.json: 1 row \(7\) outside the 3 images of .*s\.npy; .* give 0 to 2"),
        (np.zeros((3, 3)), [-1, 0, 10**30], r"rows\.json: 2 rows \(-1, 10{30}\) outside the 3 images"),
        (np.zeros((2, 3)), [0, 0, 0], "the image with id 1 has no text"),
        (np.zeros((2, 3)), [0, 1, True], "not of the expected form: a JSON list"),
        (np.zeros((2, 3)), {"rows": 1}, "not of the expected form"),
        (np.zeros((2, 3)), "[", "not JSON"),
    ],
)
def test_unusable_similarities_give_one_clear_line(tmp_path, write, content, rows, message):
    path = tmp_path / "s.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=message) as caught:
        score_retrieval(path, None if rows is None else write("rows.json", rows))
    assert "\n" not in str(caught.value)


def test_a_missing_similarity_or_name_is_said(tmp_path):
    with pytest.raises(UserError, match=r"none\.npy: no such file; expected \.npy"):
        score_retrieval(tmp_path / "none.npy")
    np.savez(tmp_path / "s.npz", scores=ROWS)
    with pytest.raises(UserError, match="similarity is not a file in the archive"):
        score_retrieval(tmp_path / "s.npz")


POPE = [
    {"question_id": n, "text": f"Is there a {n}?", "label": label}
    for n, label in enumerate(("yes", "no", "no", "yes"), 1)
]
REPLIES = ["Yes, there is.", "No. There is none", "yes", "It is not"]  # right, right, wrong, wrong


def as_lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_pope_files_in_its_form_and_in_vqas(write):
    expected = {"accuracy": 50.0, "precision": 50.0, "recall": 50.0, "f1": 50.0, "yes_ratio": 50.0}
    in_order = [{"question": row["text"], "answer": reply} for row, reply in zip(POPE, REPLIES, strict=True)]
    by_id = [{"question_id": row["question_id"], "answer": reply} for row, reply in zip(POPE, REPLIES, strict=True)]
    lines = write("a.jsonl", as_lines(POPE))
    for said in (as_lines(in_order), as_lines(by_id[::-1]), by_id):
        assert score_pope(lines, write("p", said)) == {"overall": expected, "perQuestionType": {}}
    kinds = ["random", "adversarial", "random", "random"]
    annotations = [
        {"question_id": row["question_id"], "question_type": kind, "answers": [{"answer": row["label"]}] * 10}
        for row, kind in zip(POPE, kinds, strict=True)
    ]
    scores = score_pope(write("a", {"annotations": annotations}), write("p", by_id))
    assert scores["overall"] == expected
    assert list(scores["perQuestionType"]) == ["adversarial", "random"]
    # Nobody said yes and nothing was yes: a share of nothing is 0, not a crash
    assert list(scores["perQuestionType"]["adversarial"].values()) == [100, 0, 0, 0, 0]
    assert scores["perQuestionType"]["random"]["accuracy"] == 33.33
    assert "    accuracy" in format_scores(scores)


@pytest.mark.parametrize(
    ("annotations", "predictions", "message"),
    [
        ("{", [], "a: not JSON, nor JSON a line"),
        ([], [], "annotations are empty"),
        ([{"question_id": 1, "label": "maybe"}], [], "no answer that is yes or no alone"),
        ({"annotations": [{"question_id": 1, "answers": ["yes", "no"]}]}, [], "no answer that is yes or no alone"),
        (POPE, "[5]", "p: not of the expected form"),
        (POPE, [{"question_id": 1}], "lacks an answer"),
        (POPE, [{"question_id": 1, "answer": "no"}], r"3 questions \(2, 3, 4\) of 4 without an answer"),
        (POPE, [{"question_id": n, "answer": "no"} for n in range(1, 6)], r"1 question_id \(5\) not among the 4"),
        (POPE, [{"question_id": 1, "answer": "no"}] * 2, "1 answers more than question_ids"),
        (POPE * 2, [{"question_id": n, "answer": "no"} for n in range(1, 5)], "ids repeat, as POPE's files all count from 1"),
        (POPE, [{"question_id": 1, "answer": "no"}, {"answer": "no"}], "lacks a question_id"),
        ([POPE[0] | {"question_id": [1]}], [{"question_id": 1, "answer": "no"}], "a: the record .* lacks a question_id"),
        ([POPE[0] | {"question_id": {"of": 1}}], [{"question_id": 1, "answer": "no"}], "a: the record .* lacks a question_id"),
        ([{"label": "yes"}], [{"question_id": 1, "answer": "no"}], "a: the record .* lacks a question_id; expected .*POPE's"),
        (POPE, [{"answer": "no"}], "1 answers without question_id to 4 questions"),
        (POPE, [{"question": row["text"], "answer": "no"} for row in POPE[::-1]], r"4 answers \(0, 1, 2, 3\) .*to another question"),
    ],
)  # fmt: skip
def test_unusable_pope_files_give_one_clear_line(write, annotations, predictions, message):
    with pytest.raises(UserError, match=message) as caught:
        score_pope(write("a", annotations), write("p", predictions))
    assert "\n" not in str(caught.value)
