"""Words as NLTK splits them: what is expected is what ``word_tokenize`` of NLTK 3.10.4 gives, with its English model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.tokens import MOST, SPECIAL, WordPieces, WordVocabulary, pad
from chatpose_jax.posescript.words import word_tokens

SPLIT = r"""
the person's left arm is bent at a 90 degree angle. the right leg isn't straight, it's slightly bent...
    the person 's left arm is bent at a 90 degree angle . the right leg is n't straight , it 's slightly bent ...
a push-up (or a plank?), with his hands shoulder-width apart; his back is flat.
    a push-up ( or a plank ? ) , with his hands shoulder-width apart ; his back is flat .
leaning forward at approx. 45 degrees. left foot in front of right ft. both knees bent.
    leaning forward at approx . 45 degrees . left foot in front of right ft. both knees bent .
he can't reach the ground -- his fingers are 10cm above it. they're pointing down!
    he ca n't reach the ground -- his fingers are 10cm above it . they 're pointing down !
"t-pose", and "like a waiter's pose" (palm up).
    `` t-pose '' , and `` like a waiter 's pose '' ( palm up ) .
bent at 45. the elbow is at 3,5 and 90deg., next: 11 o'clock.
    bent at 45. the elbow is at 3,5 and 90deg. , next : 11 o'clock .
the right elbow is bent.the left one too. looks up , palms down .
    the right elbow is bent.the left one too . looks up , palms down .
gonna squat; cannot bend more. 'tis the dancers' pose, 'left' side
    gon na squat ; can not bend more . ' tis the dancers ' pose , ' left ' side
on the r. leg, e.g. in u.s. style. wait ... then st. plank?), done
    on the r. leg , e.g . in u.s. style . wait ... then st . plank ? ) , done
[left] <pose> 50% #1 head/ear & 90°: yes?! ok.
    [ left ] < pose > 50 % # 1 head/ear & 90° : yes ? ! ok .
"""
PAIRS = [tuple(line.strip() for line in pair) for pair in zip(*[iter(SPLIT.strip().splitlines())] * 2)]


@pytest.mark.parametrize(("text", "words"), [*PAIRS, (" \n", "")])
def test_words_are_those_of_nltk(text: str, words: str) -> None:
    assert word_tokens(text) == words.split()


def test_a_vocabulary_holds_words_in_the_order_of_their_appearance(tmp_path: Path) -> None:
    words = WordVocabulary.of(["The arm.", "An arm <pad> is up."])
    assert words.words == (*SPECIAL, "the", "arm", ".", "an", "<", "pad", ">", "is", "up")
    assert [each.tolist() for each in words.encode(["THE knee.", ""])] == [[1, 4, 3, 6, 2], [1, 2]]
    assert WordVocabulary.of(["The arm.", "An arm is up."], 2).words == (*SPECIAL, "arm", ".")
    words.save(tmp_path)
    assert WordVocabulary.load(tmp_path).words == words.words
    long = words.encode(["arm " * 2 * MOST])[0]
    assert len(long) == MOST and long[-1] == SPECIAL.index("<end>")


def test_faults_of_token_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must begin with <pad>, <start>"):
        WordVocabulary(["a"])
    with pytest.raises(UserError, match="no word twice"):
        WordVocabulary([*SPECIAL, "a", "a"])
    with pytest.raises(UserError, match="no such file; the tokenizer of distilbert"):
        WordPieces.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="expected a tokenizer"):
        WordPieces.load(tmp_path)
    (tmp_path / WordVocabulary.FILE).write_text('{"a": 1}')
    with pytest.raises(UserError, match="a JSON list of words"):
        WordVocabulary.load(tmp_path)


def test_ids_are_padded_to_a_multiple() -> None:
    ids, lengths = pad([np.array([1, 5, 2], np.int32), np.array([1, 2], np.int32)], 4)
    assert ids.tolist() == [[1, 5, 2, 0], [1, 2, 0, 0]] and lengths.tolist() == [3, 2] and ids.dtype == np.int32
    assert pad([])[0].shape == (0, 32)
