"""`vlm score`: official files in, official numbers or one clear line out."""

import json

import pytest

from vlm.errors import UserError
from vlm.metrics.score import format_scores, score_captions, score_vqa

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
