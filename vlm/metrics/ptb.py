"""Penn Treebank tokens of a caption, as the COCO caption metrics count them, without Java.

pycocoevalcap sends captions through Stanford CoreNLP 3.4.1 (`PTBTokenizer -preserveLines -lowerCase`) and drops a list
of punctuation tokens; every published BLEU, ROUGE-L and CIDEr counts what is left. This module gives the same tokens.
It was written against that program's behaviour, observed from outside: a scanner that, at every position, tries each
pattern of a list and keeps the longest match (of equally long ones the first), because that is how a generated scanner
decides, and several odd results follow from nothing else.

Differences that remain: line separators inside a caption count as spaces (there they shift all later captions onto the
wrong images); tags and telephone numbers never run over the end of a caption (there, over a line's end, they do);
letters and signs that Unicode got after 2010 follow today's tables.
"""

# ruff: noqa: RUF001   (curly quotes and dashes are what this file is about)
import re
import unicodedata
from collections.abc import Sequence

_DROPPED = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
PUNCTUATION = frozenset(_DROPPED.split())
"""The tokens that are dropped. The brackets are in capitals here and small in the tokens, so "-lrb-" stays: as there."""

# The shadow of a caption: every character replaced by the representative of its class, so that the patterns below need
# ASCII and a few signs only.

_UNKNOWN = "\0"  # what the scanner does not know vanishes and separates words, but an address may run over it
_SPACES = re.compile("[\t-\r \xa0\u2000-\u200a\u2028\u2029\u3000]")
_SOFT_HYPHEN = "\xad"  # a letter of plain words, which is left out when they are written; of nothing else
_UNKNOWN_SIGNS = re.compile(
    "[\u0482\u055a-\u055f\u2012\u2024\u2025\u2027\u203c\u203d\u2043\u2045-\u205e\u20a1-\u20a3\u20a5-\u20ab"
    "\u20ad-\u20d0\u2150-\u2152\u215f]"
)
_SYMBOL = "¦"  # a sign that is a token by itself
_REPRESENTATIVE = {
    alike: representative
    for representative, members in {
        "’": "\u0092›", "‘": "\u0091‛‹", "“": "\u0093«", "”": "\u0094»", "…": "\u0085", "–": "\u0096\u0097—―", "‑": "‐֊",
        "€": "\u0080¤₠", "½": "¼¾⅓⅔", "²": "³¹", "‚": "„‟",
    }.items()
    for alike in representative + members
} | {"£": "£", "¢": "¢"}  # fmt: skip


class _Shadow(dict[int, str]):
    """Code point -> representative; fills itself."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if " " <= character <= "~" or character == _SOFT_HYPHEN:
            shadow = character
        elif character in _REPRESENTATIVE:
            shadow = _REPRESENTATIVE[character]
        elif _SPACES.match(character):
            shadow = " "
        elif code > 0xFFFF or category[0] in "CZ" or _UNKNOWN_SIGNS.match(character):
            shadow = _UNKNOWN
        elif category[0] in "LM" or "\u02c2" <= character <= "\u02ff":
            shadow = "É" if category == "Lu" else "é"
        else:
            shadow = "0" if category == "Nd" else _SYMBOL
        self[code] = shadow
        return shadow


_SHADOW = _Shadow()

# The patterns. Where a group "token" is named, the rest of the match is what must follow the token: it counts for the
# length of the match and is read again afterwards.

_TITLES = (  # what comes before a name, and other abbreviations that no sentence ends with
    "adj adm adv alex asst atty attys ave brig capt cf cie cmdr col cpl dept det dr drs elec ens ft gen gov govs hon"
    " insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres prof pvt rep reps rev sen"
    " sens sfc sgt spc st ste supt treas vs wm"
)
_ABBREVIATIONS = (  # "min", "oz", "in", "sun", "sat" and many others are none for the Java program
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla"
    " fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc"
    " ppte ppty pte ptes pty ptys rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo"
)
_CAPITALISED_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash"
_ABBREVIATIONS_OF_NUMBERS = "art ca fig figs no nos op pp prop"
_FILE_ENDINGS = (
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql"
    " tar txt wav x xml zip"
)
_SENTENCE_STARTS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now"
    " Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)


def _either(words: str) -> str:
    return "(?:" + "|".join(re.escape(word) for word in words.split()) + ")"


_L, _LD = "[A-Za-zéÉ]", "[A-Za-zéÉ0-9]"
_A, _Q = "(?:['’]|&apos;)", "(?:['’`‘]|&apos;)"
_WL, _WLD = f"[A-Za-zéÉ{_SOFT_HYPHEN}]", f"[A-Za-zéÉ0-9{_SOFT_HYPHEN}]"
_WORD = rf"{_WL}{_WLD}*(?:[.!?]{_WL}{_WLD}*)*"
_SUFFIX = rf"{_A}(?i:[msd]|re|ve|ll)(?![A-Za-z])|’(?i:[msd]|re|ve|ll)"
_ELIDED = rf"(?:[dDoOlL]{_Q}{_LD})?{_LD}+"
_THING = rf"{_ELIDED}(?:[-‑_]{_ELIDED})*"
_CAPITALS = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_NUMBER = rf"[-+]?(?:[0-9]+(?:[.:,{_SOFT_HYPHEN}][0-9]+)*|(?:[.:,{_SOFT_HYPHEN}][0-9]+)+)"
_PIECE = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_FACE = r"[-^x=~<>']"
_URL_END = r"[^ \"<>|.!?(){},-]"
_WWW, _SITE = r"www\.(?:[^ \"<>|.!?(){},]+\.)+", r"(?:[^ \"`'<>|!?(){},-_$]+\.)+"

_TAG = rf"<{_NAME}(?: +{_NAME}(?:=(?:\"[^\"]*\"|'[^']*'))?)* */?>|</{_NAME} *>|<[!?][A-Za-z-][^>]*>"
_SENTENCE_START = rf"(?:{_either(f'{_SENTENCE_STARTS} {_SENTENCE_STARTS.upper()}')}|{_TAG})"

_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # markup
        _TAG,
        r"&(?:(?i:amp|lt|gt|quot)|nbsp|mdash|ndash|apos|#[0-9]+);",
        # two words written as one
        r"(?P<token>(?i:can))(?i:not)",
        r"(?P<token>(?i:gon|wan))(?i:na)",
        r"(?P<token>(?i:got))(?i:ta)",
        r"(?P<token>(?i:gim|lem))(?i:me)",
        r"(?P<token>'[tT])(?i:is|was)",
        # apostrophes
        rf"(?P<token>{_WORD}){_A}(?i:[msd]|re|ve|ll)",
        rf"(?P<token>[A-Za-z{_SOFT_HYPHEN}]*[A-MO-Za-mo-z]{_SOFT_HYPHEN}*)[nN]{_Q}[tT]",
        rf"[nN]{_Q}[tT]",
        _SUFFIX,
        rf"{_A}[nN](?:{_A}|(?= ))|’[nN]",
        rf"{_A}(?:[2-9]0[sS]|[0-9]{{2}}(?= )|(?i:em|till?|cause))",
        rf"(?P<token>[yY]{_A}){_L}|[lLdDjJ]{_A}",
        rf"(?i:ol|somethin|dunkin){_A}",
        rf"(?i:o{_Q}clock|c'mon|ma{_Q}am|n?e{_Q}er|s{_Q}mores|ev{_Q}ry|nat{_Q}l|li{_Q}l|d{_Q}ye)",
        rf"[A-HJ-XZn]{_Q}{_L}{{2,}}|{_L}+[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_L}*",
        # addresses
        rf"(?i:https?)://[^ \"<>|(){{}}]+{_URL_END}",
        rf"{_WWW}[A-Za-z]{{2,4}}|{_SITE}(?:com|net|org|edu)",
        rf"(?:{_WWW}?[A-Za-z]{{2,4}}|{_SITE}?(?:com|net|org|edu))/[^ \"<>|()]+{_URL_END}",
        r"(?:<|&lt;)?[A-Za-z0-9][^ \"<>|(){}]*@(?:[^ \"<>|(){}.]+\.)*[^ \"<>|(){}.]+(?:>|&gt;)?",
        rf"@[A-Za-z_][A-Za-z0-9_]*|#{_L}+",
        # words, and what hyphens, underscores, slashes and ampersands make of them
        _WORD,
        # an abbreviation that may end a sentence: the two characters behind it count
        rf"(?P<token>(?:(?i:{_either(_ABBREVIATIONS)})|(?=[A-Z])(?i:{_either(_CAPITALISED_ABBREVIATIONS)}))\.).{{1,2}}",
        _THING,
        rf"[A-Za-z0-9][A-Za-z0-9.,{_SOFT_HYPHEN}]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9{_SOFT_HYPHEN}]+))+",
        rf"{_PIECE}(?:\\?/{_PIECE}){{1,2}}",
        rf"{_LD}+(?:\.{_LD}+)*\.(?i:{_either(_FILE_ENDINGS)})(?=[ .,!?])",
        _CAPITALS,
        r"[cC]\+\+|[cCfF]#",
        # numbers, fractions, telephone numbers, currencies of countries
        _NUMBER,
        r"(?:[0-9]{1,4}[- ])?[0-9]{1,4}/[0-9]{1,4}",
        r"[0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4}",
        r"(?:\([0-9]{2,3}\) ?|(?:\+\+?)?(?:[0-9]{2,4}[- ])?[0-9]{2,4}[- ])[0-9]{3,4}[- ]?[0-9]{3,5}",
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        r"[A-Z]+\$",
        # periods that belong to a word; a single letter keeps its own unless a sentence begins behind it
        rf"(?i:{_either(_TITLES)})\.",
        r"(?i:ph\.d)\.",
        rf"(?P<token>(?i:{_either(_ABBREVIATIONS_OF_NUMBERS)})\.) ?[0-9]",
        r"[A-Za-z](?:\.[A-Za-z])*\.",
        rf"(?P<token>[A-Za-z])\. +{_SENTENCE_START} ",
        rf"(?P<token>(?:{_THING}|{_WORD}|{_CAPITALS})\.)[,;:]",
        rf"(?P<token>[A-Za-z0-9][A-Za-z0-9.,{_SOFT_HYPHEN}]*(?:-[A-Za-z0-9{_SOFT_HYPHEN}]+)+\.)[,;:]",
        # faces and repeated signs
        r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])",
        rf"\({_FACE}[_.]?{_FACE}\)|\([\^x=~<>']-[\^x=~<>'`]\)|{_FACE}_{_FACE}",
        r"[?!]+|-{2,}|\*+|_+|#+|@+|\.{3,5}|[“”‘’`‚]{2}|''|<<|>>|²+|\\\*",
    )
)
# Nearly all of a caption is words between spaces, which no pattern above can lengthen: they skip the search.
_PLAIN_WORD = re.compile(r"([A-Za-z]+) +")
_JOINED = frozenset({"cannot", "gonna", "gotta", "wanna", "gimme", "lemme"})

_SIGNS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''",
    "€": "$", "\u0080": "$", "¤": "$", "₠": "$", "£": "#", "¢": "cents",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "‐": "-", "‑": "-", "…": "...", "\u0085": "...", "....": "...", ".....": "...", "---": "--", "----": "--",
    "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&amp;": "&", "&mdash;": "--", "&ndash;": "--", "&nbsp;": "-",
}  # fmt: skip
_SIGNS_WITHIN = str.maketrans(
    dict.fromkeys("’›\u0092", "'") | dict.fromkeys("‘‛‹\u0091", "`") | dict.fromkeys("“«\u0093", "``")
    | dict.fromkeys("”»\u0094", "''") | dict.fromkeys("–—―\u0096\u0097", "--") | {"(": "-lrb-", ")": "-rrb-"}
)  # fmt: skip
_CONTRACTION = re.compile(r"n?[’‘‛‹›\u0091\u0092](?:[tsmd]|re|ve|ll)")


def _spelling(token: str) -> str:
    """How a stretch of the caption is written as a token."""
    token = token.lower()
    if "@" not in token and "/" not in token:
        token = token.replace(_SOFT_HYPHEN, "") or "-"
    if token in _SIGNS:
        return _SIGNS[token]
    if _CONTRACTION.fullmatch(token) or not any(map(str.isalnum, token)):
        return token.translate(_SIGNS_WITHIN)
    token = token.replace(" ", "\u00a0")
    if "@" in token or "/" in token or token.startswith("<"):
        return token
    return token.replace("&amp;", "&").replace("&apos;", "'").replace("(", "-lrb-").replace(")", "-rrb-")


def _tokens(caption: str) -> list[str]:
    shadow = caption.translate(_SHADOW) + " "
    tokens: list[str] = []
    start = 0
    while start < len(shadow):
        if shadow[start] in (" ", _UNKNOWN):
            start += 1
            continue
        plain = _PLAIN_WORD.match(shadow, start)
        if plain and plain[1].lower() not in _JOINED:
            tokens.append(plain[1].lower())
            start = plain.end()
            continue
        longest, end = start, start + 1
        for pattern in _PATTERNS:
            match = pattern.match(shadow, start)
            if match and match.end() > longest:
                longest = match.end()
                taken = match.end("token") if "token" in pattern.groupindex else -1
                end = taken if taken > 0 else longest
        tokens.append(_spelling(caption[start:end]))
        start = end
    return [token for token in tokens if token not in PUNCTUATION]


def tokenize(caption: str) -> str:
    """The caption's tokens in lower case, without punctuation, with spaces between: pycocoevalcap's PTBTokenizer.

    A telephone number, a mixed fraction or a tag is one token, with no-break spaces inside.
    """
    return " ".join(_tokens(caption))


_ENDS_IN_LETTER = re.compile(r"(?:^|[^A-Za-z0-9.])[A-Za-z]\.\s*$")
_BEGINS_SENTENCE = re.compile(rf"\s*{_SENTENCE_START}\s")


def tokenize_all(captions: Sequence[str]) -> list[str]:
    """`tokenize` for the captions of one file, in the file's order.

    The order matters in one case, kept for the sake of equal scores: the Java program reads the file as one text, so
    a caption that ends in a lone letter ("reads K.") loses that period where the next one begins like a sentence.
    """
    tokenized = [tokenize(caption) for caption in captions]
    for index in range(len(captions) - 1):
        following = "\n".join(captions[index + 1 : index + 3])
        if _ENDS_IN_LETTER.search(captions[index]) and _BEGINS_SENTENCE.match(following):
            tokenized[index] = tokenized[index].removesuffix(".")
    return tokenized
