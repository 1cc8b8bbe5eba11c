"""What a question of yes or no states of the picture: "Is this a kitchen?" states "a kitchen" (after Song et al. 2022, CLIP Models are Few-shot
Learners, who bring questions into the form of captions). English only."""

import re

from vlm.data.made_questions import ANIMALS, PEOPLE

_SOMEBODY = "|".join(sorted(PEOPLE | ANIMALS | {"gentleman", "animal"}))
_FORMS = [  # what the whole question matches, and what it states
    (re.compile(pattern), statement)
    for pattern, statement in (
        (r"(?:is|was|could|might|can|would) (?:this|that|it)(?: be)? ((?:an?|the|some) .+)", r"\1"),
        (r"(?:could|might|can|would) (?:this|that|it|these|those|they) be (.+)", r"\1"),
        (r"(?:is|are) there (?:any |some )?(.+)", r"\1"),
        (r"(?:do|can) (?:you|we) see (?:any |some )?(.+)", r"\1"),
        (rf"is (?:this|that) ((?:{_SOMEBODY})\b.*)", r"a \1"),
        (r"are (?:these|those) (.+)", r"\1"),
    )
]
_IN_THE_PICTURE = re.compile(r" (?:in|on) (?:the|this) (?:picture|photo|photograph|image)$")


def statement(question: str) -> str | None:
    """The words of a caption that are true of the image if the answer is yes; None for a question of another form."""
    words = " ".join(question.lower().replace("?", " ").split())
    for form, stated in _FORMS:
        if found := form.fullmatch(words):
            return _IN_THE_PICTURE.sub("", found.expand(stated))
    return None
