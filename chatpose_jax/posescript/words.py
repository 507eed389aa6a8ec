"""Splits captions into the words that NLTK's ``word_tokenize`` gives, without NLTK, for text in small letters.

NLTK finds sentences by Punkt (Kiss & Strunk 2006), then splits each by the rules of the Penn Treebank's tokenizer. Sentences matter, because a
full stop is a word of its own only at the end of one. Punkt's model has tables of words. Here only its abbreviations are used. Its statistics of
capital letters matter for lower-case text only after a number or a single letter, and only for rare words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_CLOSING = "\"')]}‘’“”«»"
_END = re.compile(r"[.?!](?=[)\";}\]*:@'({\[?!‘’“”«»]|\s+(?P<next>\S+))")
"""A mark that may end a sentence, and what follows it."""
_WORD = re.compile(r"[^\s(\"`{\[:;&#*@)}\]\-,][^\s)\";}\]*:@'({\[?!‘’“”«»]*$")
"""What Punkt takes for the last word."""
_INSIDE = re.compile(r"[?!].|\.[)\";}\]*:@'({\[?!‘’“”«»,]")
"""The end of a sentence in the next word: Punkt then takes the mark before that word for an end too."""
_SHORT = """adm ala ariz aug ave bros calif chg cie co col colo conn corp cos ct dec dr feb fla fri ft ga gen ill inc jan jr kan ky lt ltd maj
messrs mg mich minn mr mrs ms nev nov oct ok okla ore pa prof rep reps sen sep sept sr st sw tenn tues va vs vt w.va wash wed wis yr a.a a.c a.d
a.g a.h a.m a.m.e a.s a.t b.f b.v c.i.t c.o.m.b c.v d.c d.h d.w e.f e.h e.l e.m f.g f.j g.d g.f g.k h.c h.f h.m i.m.s j.b j.c j.j j.k j.p j.r l.a
l.f l.p m.b.a m.d.c m.j n.c n.d n.h n.j n.m n.v n.y p.a.m p.m ph.d r.a r.h r.i r.j r.k r.t s.a s.a.y s.c s.g s.p.a s.s t.j u.k u.n u.s u.s.a
u.s.s.r w.c w.r w.w c d e f g h k l m n p r s t v w"""
_ABBREVIATIONS = frozenset(_SHORT.split())
"""Words after which Punkt's English model takes a full stop for part of the word."""
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # quotes that open
        (r"[«“‘„]|`+", r" \g<0> "),
        (r"^\"|(?<=[ (\[{<])(?:\"|'')", " `` "),
        (r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' "),
        # the last full stop
        (r"(?<=[^.])\.([\])}>\"'»”’ ]*)\s*$", r" . \1 "),
        (r"[:,](?=\D|$)", r" \g<0> "),
        (r"\.{2,}|[;@#$%&‒-―?!]", r" \g<0> "),
        (r"(?<=[^'])' ", " ' "),
        (r"[*\[\](){}<>]|--", r" \g<0> "),
        # quotes that close
        (r"[»”’]", r" \g<0> "),
        (r"''|\"", " '' "),
        (r"^|$|\s+", " "),
        (r"(?<=[^' ])'[smd]?(?= )", r" \g<0>"),
        (r"(?<=[^' ])(?:'ll|'re|'ve|n't)(?= )", r" \g<0>"),
        # words that are two
        (
            r"\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b",
            " SPLIT ",
        ),
        (r"\b(wan)(na)(?=\s)|(?<= )('t)(is|was)\b", " SPLIT "),
    )
)


def word_tokens(text: str) -> list[str]:
    """The words and marks of a text in small letters."""
    return [word for sentence in _sentences(text) for word in _split(sentence)]


def _split(sentence: str) -> list[str]:
    for pattern, replacement in _RULES:
        if replacement == " SPLIT ":
            sentence = pattern.sub(lambda found: f" {' '.join(filter(None, found.groups()))} ", sentence)
        else:
            sentence = pattern.sub(replacement, sentence)
    return sentence.split()


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for found in _END.finditer(text):
        if found.start() < start or not _ends(text, found):
            continue
        end = found.end()
        rest = text[end:].lstrip() if found["next"] else text[end:]
        closing = re.match(rf"[{re.escape(_CLOSING)}](?:\s+|(?=--)|$)", rest)
        if closing:  # belongs to the sentence before it
            yield text[start:end] + text[end : len(text) - len(rest)] + closing[0].rstrip()
            start = len(text) - len(rest) + closing.end()
        else:
            yield text[start:end]
            start = len(text) - len(rest)
    yield text[start:].rstrip()


def _ends(text: str, found: re.Match[str]) -> bool:
    """Whether a mark ends a sentence."""
    follows = found["next"] or text[found.end()]
    if found[0] != "." or _INSIDE.search(follows):
        return True
    before = _WORD.search(text[: found.start()])
    word = before[0] if before else ""
    if word.endswith("."):  # dots that stand for words that are left out
        return False
    if word in _ABBREVIATIONS or word.rpartition("-")[2] in _ABBREVIATIONS:
        return False
    if re.fullmatch(r"[^\W\d]|-?[\d.,]*\d[\d.,]*", word):  # a single letter or a number
        return not re.match(r"[^\W\d_]|[;:,!?]|\.(?!\.)", follows)
    return True
