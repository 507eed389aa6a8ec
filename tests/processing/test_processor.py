"""Ids, labels and truncation of conversations; what a KV cache may rely on; what user text must not do."""

import dataclasses
import shutil

import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.conversation import TEMPLATES
from chatpose_jax.processing.processor import IGNORE, ModelIds, Processor, tiny_processor

GREY = np.full((40, 60, 3), 128, np.uint8)


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
    }


def assistant(text):
    return {"role": "assistant", "content": text}


def learnt(encoded):
    return encoded.labels[encoded.labels != IGNORE].tolist()


def test_prompt_is_vicunas(chatpose, sentencepiece_model):
    """The whole prompt tokenised at once by SentencePiece, with BOS, as LLaVA-1.5 does it."""
    encoded = chatpose.encode([user("Can you show a pose?")])
    system = TEMPLATES["vicuna_v1"].system
    text = f"{system} USER: Can you show a pose? ASSISTANT:"
    assert encoded.input_ids.tolist() == [1, *sentencepiece_model.encode(text)]
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32
    assert learnt(encoded) == []


def test_two_turns_are_vicunas(chatpose, sentencepiece_model):
    encoded = chatpose.encode([user("One?"), assistant("First."), user("Two?"), assistant("Second.")], False)
    encode, system = sentencepiece_model.encode, TEMPLATES["vicuna_v1"].system
    first, second = f"{system} USER: One? ASSISTANT: First.", "USER: Two? ASSISTANT: Second."
    assert encoded.input_ids.tolist() == [1, *encode(first), 2, *encode(second), 2]
    assert learnt(encoded) == [*encode("First."), 2, *encode("Second."), 2]


def test_image_becomes_patches(chatpose, sentencepiece_model):
    encoded = chatpose.encode([user("What is this?", GREY)])
    before = f"{TEMPLATES['vicuna_v1'].system} USER: "
    after = "\nWhat is this? ASSISTANT:"
    expected = [1, *sentencepiece_model.encode(before), *4 * [-200], *sentencepiece_model.encode(after)]
    assert encoded.input_ids.tolist() == expected
    assert [image.shape for image in encoded.images] == [(28, 28, 3)]
    assert encoded.images[0].dtype == np.float32


def test_markers(chatpose, chatpose_config, chatpose_folder, sentencepiece_model, tmp_path):
    messages = [user("What is this?", GREY)]
    spelled = Processor(chatpose.tokenizer, chatpose.ids, markers="always").encode(messages).input_ids.tolist()
    start = sentencepiece_model.encode(f"{TEMPLATES['vicuna_v1'].system} USER: <im_start>")
    assert spelled[: len(start) + 5] == [1, *start, *4 * [-200]]
    shutil.copyfile(chatpose_folder / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"[SEG]": 32000, "<im_start>": 32001, "<im_end>": 32002}')
    config = chatpose_config.replace(text=dataclasses.replace(chatpose_config.text, vocab_size=32003))
    marked = Processor.load(tmp_path, config)  # markers="always", here as tokens
    ids = marked.encode(messages).input_ids.tolist()
    colon = sentencepiece_model.piece_to_id(":")
    at = ids.index(32001)
    assert ids[at - 1 : at + 6] == [colon, 32001, *4 * [-200], 32002]
    never = Processor(marked.tokenizer, marked.ids, markers="never").encode(messages).input_ids
    assert not np.isin([32001, 32002], never).any()


def test_folder_without_settings_follows_the_vocabularys_maker(chatpose_folder, chatpose_config, tiny, tmp_path):
    released = Processor.load(chatpose_folder, chatpose_config)
    assert (released.template, released.markers) == (TEMPLATES["llava_v1"], "always")
    tiny.tokenizer.save(tmp_path)
    other = Processor.load(tmp_path, preset("tiny"))
    assert (other.template, other.markers, other.images.fit) == (TEMPLATES["vicuna_v1"], "auto", "crop")


def test_system_message_replaces_the_templates(tiny):
    encoded = tiny.encode([{"role": "system", "content": "Be brief."}, user("Hi")])
    assert encoded.input_ids.tolist() == [1, *tiny.tokenizer.encode("Be brief. USER: Hi ASSISTANT:")]


@pytest.mark.parametrize("answer", ["<POSE>", "<POSE> it is.", "Two: <POSE> and <POSE>.", "None here."])
def test_poses_are_spliced_and_learnt(chatpose, answer):
    encoded = chatpose.encode([user("Q"), assistant(answer)], False)
    assert len(encoded.pose_positions) == answer.count("<POSE>")
    assert (encoded.input_ids[encoded.pose_positions] == 32000).all()
    assert (encoded.labels[encoded.pose_positions] == 32000).all()
    assert learnt(encoded)[-1] == 2
    assert encoded.pose_positions.dtype == np.int32


def test_labels_are_answers_alone(tiny):
    encoded = tiny.encode([user("What?", GREY), assistant("It is <POSE>."), user("And?"), assistant("No.")], False)
    on = encoded.labels != IGNORE
    np.testing.assert_array_equal(encoded.labels[on], encoded.input_ids[on])
    assert not on[encoded.input_ids == tiny.ids.image_token_id].any()
    assert not on[0]
    assert np.count_nonzero(encoded.input_ids[on] == 2) == 2
    assert tiny.decode(encoded.input_ids[on]) == "It is <POSE>. No."


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 2), ()])
@pytest.mark.parametrize("fixture", ["tiny", "chatpose"])
def test_next_prompt_begins_with_the_last_one_and_its_answer(request, fixture, asked):
    """Three turns; the answers are generated ids, such as no tokeniser would choose for their text."""
    processor = request.getfixturevalue(fixture)
    pose = processor.ids.pose_token_id
    rng = np.random.default_rng(5)
    history, known = [], np.zeros(0, np.int32)
    for turn in range(3):
        history.append(user(f"Question {turn}?", *([GREY] if turn in asked else [])))
        prompt = processor.encode(history)
        np.testing.assert_array_equal(prompt.input_ids[: len(known)], known)
        assert len(prompt.images) == sum(other <= turn for other in asked)
        generated = [pose, *rng.integers(300, 1000, 5).tolist(), pose]
        known = np.array([*prompt.input_ids, *generated, 2])
        history.append({"role": "assistant", "content": processor.decode(generated), "ids": generated})
    full = processor.encode(history, False)
    np.testing.assert_array_equal(full.input_ids, known)
    assert len(full.pose_positions) == 6


@pytest.mark.parametrize("literal", ["<POSE>", "[SEG]", "<image>", "</s>", "<s>", "<unk>", "<im_start>", "<0x0A>"])
@pytest.mark.parametrize("fixture", ["tiny", "chatpose"])
def test_user_text_cannot_inject_control_ids(request, fixture, literal):
    processor = request.getfixturevalue(fixture)
    encoded = processor.encode([user(f"a {literal} b{literal}{literal}")])
    ids = encoded.input_ids[1:]
    control = [0, 1, 2, processor.ids.pose_token_id, processor.ids.image_token_id]
    assert not np.isin(ids, control).any()
    assert literal in processor.decode(ids)


@pytest.mark.parametrize("literal", ["</s>", "<image>", "[SEG]"])
def test_answers_hold_no_control_id_but_poses(chatpose, literal):
    ids = learnt(chatpose.encode([user("Q"), assistant(f"a {literal} <POSE>")], False))
    assert [index for index in ids if index in (0, 1, 2, -200, 32000)] == [32000, 2]


@pytest.mark.parametrize("bad", [2, -200, -1, 32001])
def test_ids_of_an_answer_are_checked(chatpose, bad):
    with pytest.raises(UserError, match=rf"messages\[1\]: 'ids' holds {bad};"):
        chatpose.encode([user("Q"), {"role": "assistant", "ids": [500, bad]}, user("R")])


def test_an_empty_answer_is_kept(tiny):
    """A model may end its answer at once; the history must still hold that, and no one trains on it."""
    prompt = tiny.encode([user("Q")]).input_ids
    for said in ({"content": "", "ids": []}, {"content": ""}, {"content": []}):
        talk = [user("Q"), {"role": "assistant", **said}, user("R")]
        assert tiny.encode(talk).input_ids[: len(prompt) + 1].tolist() == [*prompt, 2]
        if "ids" not in said:
            for learnt in (talk, talk[:2]):
                with pytest.raises(UserError, match=r"messages\[1\]: empty content"):
                    tiny.encode(learnt, add_generation_prompt=False)


def test_plain_text_is_learnt_after_the_beginning_of_the_template(tiny):
    text = "A river bends. No <POSE>, no </s>."
    encoded = tiny.encode([{"role": "text", "content": text}], add_generation_prompt=False)
    expected = tiny.tokenizer.encode(text)
    assert encoded.input_ids.tolist() == [tiny.ids.bos_token_id, *expected] and learnt(encoded) == expected
    assert not len(encoded.pose_positions) and tiny.ids.eos_token_id not in expected
    with pytest.raises(UserError, match="plain text, so there is nothing to answer"):
        tiny.encode([{"role": "text", "content": text}])


def test_nothing_to_answer(tiny):
    with pytest.raises(UserError, match="end with a user message"):
        tiny.encode([user("Q"), assistant("A")])


def test_too_long_a_prompt_names_both_lengths(tiny):
    with pytest.raises(UserError, match=r"has \d{4} tokens, but .* holds 1024;"):
        tiny.encode([user("word " * 1100)])
    patches = tiny.ids.num_patches
    count = 1024 // patches + 1
    with pytest.raises(UserError, match=rf"\({count * patches} of them for {count} images\)"):
        tiny.encode([user("Who?", *[GREY] * count)])


def test_truncation_never_cuts_an_image(tiny):
    messages = [user("What?", GREY, GREY), assistant("It is <POSE> or <POSE>.")]
    full = tiny.encode(messages, False)
    patches = np.flatnonzero(full.input_ids == tiny.ids.image_token_id)
    for length in range(3, len(full.input_ids) + 2):
        cut = tiny.encode(messages, False, max_length=length)
        held = np.count_nonzero(cut.input_ids == tiny.ids.image_token_id)
        assert len(cut.input_ids) <= length
        assert held % tiny.ids.num_patches == 0
        assert len(cut.images) == held // tiny.ids.num_patches
        np.testing.assert_array_equal(cut.input_ids, full.input_ids[: len(cut.input_ids)])
        np.testing.assert_array_equal(cut.pose_positions, full.pose_positions[full.pose_positions < length])
        assert cut.truncated == (length < len(full.input_ids))
        if not patches[0] < length <= patches[-1]:
            assert len(cut.input_ids) == min(length, len(full.input_ids))


def test_measuring_opens_no_image(tiny):
    messages = [user("What?", "nowhere.png"), assistant("It is <POSE>.")]
    full = tiny.encode([user("What?", GREY), messages[1]], False)
    length, pose = len(full.input_ids), int(full.pose_positions[0])
    image = int(np.flatnonzero(full.input_ids == tiny.ids.image_token_id)[-1])
    assert tiny.measure(messages) == (length, 1, 1, False, length - pose - 1)
    assert tiny.measure(messages, pose) == (pose, 1, 0, True, pose - image - 1)
    with pytest.raises(UserError, match=r"messages\[0\].content\[0\]: no image file"):
        tiny.encode(messages, False)


def test_late_normalisation_is_the_same(tiny):
    messages = [user("What?", GREY)]
    (late,) = tiny.encode(messages, normalise=False).images
    assert late.dtype == np.uint8
    np.testing.assert_array_equal(tiny.images.normalise(late), tiny.encode(messages).images[0])


def test_folder_without_pose_token_says_what_to_do(chatpose_folder, chatpose_config, tmp_path):
    shutil.copyfile(chatpose_folder / "tokenizer.model", tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"no pose token.*'<POSE>' or '\[SEG\]' with id 32000.*chatpose convert"):
        Processor.load(tmp_path, chatpose_config)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pose_token_id": 31999}, "pose token has id 32000, the model's 31999"),
        ({"eos_token_id": 3}, "</s> token has id 2"),
        ({"bos_token_id": 0}, "BOS token has id 1"),
        ({"vocab_size": 32000}, "32001 rows, the model only 32000"),
        ({"image_token_id": 31999}, "image_token_id=31999 is"),
        ({"image_size": 336}, None),
    ],
)
def test_tokenizer_of_another_model_is_refused(chatpose, change, error):
    ids = dataclasses.replace(chatpose.ids, **change)
    if error is None:
        assert Processor(chatpose.tokenizer, ids).images.size == 336
        with pytest.raises(UserError, match=r"images\.size=28"):
            Processor(chatpose.tokenizer, ids, images=chatpose.images)
    else:
        with pytest.raises(UserError, match=error):
            Processor(chatpose.tokenizer, ids)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"template": {}}', '{"images": {"mean": 3}}'])
def test_damaged_settings_file(tiny, tmp_path, content):
    tiny.save(tmp_path)
    (tmp_path / "processor.json").write_text(content)
    with pytest.raises(UserError, match=r"processor\.json"):
        Processor.load(tmp_path, preset("tiny"))


def test_tiny_survives_its_folder(tiny, tmp_path):
    tiny.save(tmp_path)
    again = Processor.load(tmp_path, preset("tiny"))
    messages = [user("What is this person doing?", GREY), assistant("Standing: <POSE>."), user("Thanks.")]
    np.testing.assert_array_equal(again.encode(messages).input_ids, tiny.encode(messages).input_ids)
    assert again.template == tiny.template == TEMPLATES["plain"]


def test_preset_ids_are_the_embedded_tokenizers():
    config = preset("tiny")
    processor = tiny_processor(config)
    assert processor.tokenizer.size == config.text.vocab_size
    assert processor.tokenizer.image_token_id == config.image_token_id
    assert ModelIds.of(config).num_patches == (64 // 16) ** 2


def test_a_model_without_tower_takes_no_images():
    """It counts them all the same, for an index of rows that other models will read."""
    config = preset("tiny").replace(vision=None)
    processor = tiny_processor(config)
    assert processor.images is None and processor.ids.num_patches == processor.ids.image_size == 0
    shown = [user("What is this?", GREY), assistant("It is <POSE>.")]
    with pytest.raises(
        UserError, match=r"messages\[0\]\.content\[0\]: this model has no vision tower.*without the image"
    ):
        processor.encode(shown, False)
    words = [user("What is this?"), assistant("It is <POSE>.")]
    sight = tiny_processor(preset("tiny"))
    assert processor.encode(words, False).input_ids.tolist() == sight.encode(words, False).input_ids.tolist()
    counted, seen = processor.measure(shown), sight.measure(shown)
    assert (counted.images, counted.poses, counted.tail) == (seen.images, seen.poses, seen.tail) == (1, 1, seen.tail)
    assert counted.tokens == seen.tokens - sight.ids.num_patches
    assert processor.measure(shown, 10).tokens == 10


def test_the_settings_of_a_model_without_tower_have_no_images(tmp_path):
    config = preset("tiny").replace(vision=None)
    tiny_processor(config).save(tmp_path)
    assert Processor.load(tmp_path, config).images is None
    tiny_processor(preset("tiny")).save(tmp_path / "other")
    with pytest.raises(UserError, match="images of 64 pixels, but this model has no vision tower"):
        Processor.load(tmp_path / "other", config)
