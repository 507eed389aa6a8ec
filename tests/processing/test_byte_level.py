"""Byte-level tokenizers: ids equal those of transformers, except that no text gives a control token; text survives, whole and streamed."""

import json
import random
import unicodedata

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatpose_jax.errors import UserError
from chatpose_jax.processing.tokenizer import StreamDecoder, TextTokenizer

from ..byte_level import KINDS, backend, fast_json, files, text_tokenizer, write

TEXTS = [
    "It is",
    "The left arm isn't raised; WE'LL see, they'Re not.",
    "a  b",
    "x" + " " * 15 + "y",
    " leading and trailing ",
    "\nWhat is\tthis?\n\n  \r\n \u3000\xa0!",
    "1 12 123 1234 12345678 3.14159 ٣٤٥ ²½",
    "naïve café e\u0301 日本語 🙂🏽 👩\u200d👩\u200d👧 \u200b\x00\x04\x7f \U000f1234 \ufeff",
    "▁ Ġ Ċ <0x0A> [SEG]",
    "jupyte r im_start begin_of_text",
]
NAMES = [
    "<POSE>",
    "<image>",
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<think>",
    "</s>",
    "jupyter",
    "<repo_name>",
]


def random_texts(seed: int, count: int = 300) -> list[str]:
    """Texts of words, digits, white space, and characters of all of Unicode."""
    draw = random.Random(seed)
    planes = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0x10FFFF)]

    def character() -> str:
        code = draw.randint(*draw.choice(planes))
        return "?" if 0xD800 <= code < 0xE000 else chr(code)

    words = [
        "the",
        "License",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "isn't",
        "12",
        "345",
        ".",
        "<|",
        "|>",
        "im_end",
        "e\u0301",
    ]
    return [
        "".join(draw.choice(words) if draw.random() < 0.6 else character() for _ in range(draw.randrange(1, 25)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers(kind):
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend(kind))
    ours = text_tokenizer(kind)
    held = ours.control.keys()
    for text in TEXTS + random_texts(1):
        assert not any(name in text for name in held), text
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("kind", ["llama3", "qwen"])
def test_ids_equal_those_of_the_familys_class(kind, tmp_path):
    """transformers builds Qwen's normaliser and regular expression itself."""
    write(tmp_path, kind)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), TextTokenizer.read(tmp_path)
    assert type(theirs).__name__ == {"qwen": "Qwen2Tokenizer", "llama3": "TokenizersBackend"}[kind]
    for text in TEXTS + random_texts(2, 100):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gives_a_control_id(kind):
    """transformers gives these ids for the names, wherever they stand in a text."""
    ours, theirs = text_tokenizer(kind), PreTrainedTokenizerFast(tokenizer_object=backend(kind))
    for name in ours.control:
        for text in (name, f"a {name} b", name + name, f"x{name}y\n{name}"):
            ids = ours.encode(text)
            assert not set(ids) & set(ours.control.values()), text
            assert ours.decode(ids) == text
            assert ours.control[name] in theirs.encode(text, add_special_tokens=False)
    draw = random.Random(3)
    for text in random_texts(4, 100):
        text = "".join(part + draw.choice(NAMES) for part in (text[:3], text[3:7], text[7:]))
        assert not set(ours.encode(text)) & set(ours.control.values()), text


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("name", ["ĠLicense", "Ġ</", "ications", "ĠDerivative", "Ġ"])
def test_a_control_token_that_merges_make_is_not_made(name, ignore_merges):
    """A word of the vocabulary that is declared a control token. ignore_merges finds whole words without merges."""
    data = fast_json("gpt2")
    data["model"]["ignore_merges"] = ignore_merges
    index = data["model"]["vocab"][name]
    data["added_tokens"].insert(0, {**data["added_tokens"][0], "id": index, "content": name})
    ours = TextTokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)), "gpt2", files("gpt2"))
    assert ours.control[name] == index
    for text in (
        " License </s> modifications of a Derivative",
        " Licenseications",
        "ications LicensesDerivative </Derivative",
    ):
        ids = ours.encode(text)
        assert index not in ids
        if name != "Ġ":  # then there is no space
            assert ours.decode(ids) == text


def test_blank_added_tokens_are_text():
    """GPT-NeoX has runs of spaces among its added tokens."""
    data = fast_json("gpt2")
    size = 1 + max(token["id"] for token in data["added_tokens"])
    blank = {"content": "   ", "special": False, "normalized": True}
    data["added_tokens"].append({**data["added_tokens"][0], "id": size, **blank})
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    ours, theirs = TextTokenizer(tokenizer, "gpt2", files("gpt2")), PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for text in ("a   b", "   ", "a      b  c"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
    assert size in ours.encode("a   b") and ours.piece(size) == b"   "


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives(kind):
    ours = text_tokenizer(kind)
    for text in TEXTS + random_texts(5):
        expected = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        assert ours.decode(ours.encode(text)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_stream_joined_is_decode_and_breaks_no_character(kind):
    ours, draw = text_tokenizer(kind), random.Random(6)
    for text in TEXTS + random_texts(7, 50):
        stream = StreamDecoder(ours)
        pieces = [stream.push(index) for index in ours.encode(text)]
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
        assert "".join(pieces) + stream.flush() == ours.decode(ours.encode(text))
    for _ in range(100):  # ids as a model may draw them, half characters and control tokens among them
        ids = [draw.randrange(ours.size) for _ in range(20)]
        stream = StreamDecoder(ours)
        assert "".join(stream.push(index) for index in ids) + stream.flush() == ours.decode(ids)
        silent = set(ours.control.values())
        expected = b"".join(ours.piece(index) or b"" for index in ids if index not in silent).decode("utf-8", "replace")
        if ours.pose_token_id not in ids:
            assert ours.decode(ids) == expected


def test_every_byte_has_a_piece():
    ours = text_tokenizer("llama3")
    singles = {ours.piece(index) for index in range(ours.size)}
    assert {bytes([byte]) for byte in range(256)} <= singles
    assert ours.piece(ours.size) is None and ours.piece(-200) is None


@pytest.mark.parametrize(
    ("answer", "stretches"),
    [
        ("<POSE>", ["", ""]),
        ("It is <POSE>.", ["It is", "."]),
        ("<POSE> and <POSE>", ["", " and", ""]),
        ("Look:\n<POSE>\nThere.", ["Look:\n", "\nThere."]),
    ],
)
def test_only_the_space_before_a_pose_goes(answer, stretches):
    ours = text_tokenizer("smollm2")
    assert ours.stretches(answer) == stretches
    first, *rest = stretches
    ids = ours.encode(first) + [index for text in rest for index in (ours.pose_token_id, *ours.encode(text))]
    assert ours.decode(ids) == answer


def test_bytes_that_a_vocabulary_lacks_give_nothing():
    """As in transformers. SmolLM2's lacks some control characters."""
    data = fast_json("gpt2")
    del data["model"]["vocab"]["Ą"]  # 0x04
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    ours = TextTokenizer(tokenizer, "gpt2", files("gpt2"))
    assert ours.encode("a\x04b") == ours.encode("a") + ours.encode("b")
    assert ours.encode("a\x04b") == PreTrainedTokenizerFast(tokenizer_object=tokenizer).encode(
        "a\x04b", add_special_tokens=False
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "expected BPE .*found BPE behind the pre-tokenizer Whitespace"),
        ({"pre_tokenizer": None}, "behind the pre-tokenizer none"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "add_prefix_space=True is not supported",
        ),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, change, error):
    write(tmp_path, "gpt2")
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast_json("gpt2") | change))
    with pytest.raises(UserError, match=error):
        TextTokenizer.read(tmp_path)


def test_settings_of_a_byte_level_tokenizer_name_no_token_of_llama(tmp_path):
    TextTokenizer(backend("qwen")).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).keys() == {
        "tokenizer_class",
        "clean_up_tokenization_spaces",
    }
    again = TextTokenizer.read(tmp_path)
    assert again.bos_token_id is None and again.encode("Hi 12") == text_tokenizer("qwen").encode("Hi 12")
