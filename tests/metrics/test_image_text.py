"""The image-text score: 2.5 x max(cosine, 0), with each caption's own photograph."""

import json

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.metrics.image_text import image_text_scores, score_pairs
from vlm.metrics.score import score_image_text


class Angles:
    """Embeds a file by the number in it and a text by the number that it is: as angles in degrees."""

    def embed_images(self, images):
        return self.embed_texts([path.read_text() for path in images])

    def embed_texts(self, texts):
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], 1)


@pytest.fixture
def folder(tmp_path):
    for name, angle in {"1.jpg": 0, "COCO_val2014_000000000012.jpg": 10, "dog.jpg": 90, "a.b.png": 180}.items():
        (tmp_path / name).write_text(str(angle))
    (tmp_path / "deeper").mkdir()
    return tmp_path


def test_the_formula():
    images, texts = np.array([[2, 0], [1, 1], [1, 0], [0, 0]]), np.array([[5, 0], [1, 0], [-1, 0], [1, 0]])
    assert image_text_scores(images, texts) == pytest.approx([2.5, 2.5 / np.sqrt(2), 0, 0])


def test_each_caption_meets_its_own_photograph(folder):
    cosines = np.cos(np.radians([60, 0, 0]))
    captions = {1: "60", 12: "10", "dog": "90"}  # by stem, by the number at the end, by stem
    assert score_pairs(Angles(), captions, folder, {}) == pytest.approx(2.5 * cosines.mean())
    assert score_pairs(Angles(), {7: "180"}, folder, {7: "a.b.png"}) == pytest.approx(2.5)


def test_files_name_the_images(folder, tmp_path):
    references, predictions = tmp_path / "r.json", tmp_path / "p.json"
    listing = [{"id": 1}, {"id": 5, "file_name": "dog.jpg"}, {"id": [1], "file_name": "x"}, 3]
    references.write_text(json.dumps({"images": listing, "annotations": []}))
    predictions.write_text(json.dumps([{"image_id": 1, "caption": "0"}, {"image_id": 5, "caption": "270"}]))
    assert score_image_text(Angles(), references, predictions, folder) == pytest.approx({"image_text_score": 1.25})


def test_photographs_that_are_missing_or_several_are_named(folder):
    with pytest.raises(UserError, match=r"no file for 2 images \(2, 'cat'\) of 3; expected one each"):
        score_pairs(Angles(), {1: "0", 2: "0", "cat": "0"}, folder, {})
    (folder / "x_0001.jpg").write_text("0")
    with pytest.raises(UserError, match=r"several files for 1 image \(1\) of 1"):
        score_pairs(Angles(), {1: "0"}, folder, {})
    with pytest.raises(UserError, match="predictions are empty"):
        score_pairs(Angles(), {}, folder, {})
    with pytest.raises(UserError, match="expected a folder of the images"):
        score_pairs(Angles(), {1: "0"}, folder / "none", {})
