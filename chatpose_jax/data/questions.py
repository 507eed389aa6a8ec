"""Questions of users and answers of the assistant, to choose from. {caption} is a caption with its full stop, {edit} a change of the pose as a
clause, {change} one in sentences, {motion} what a recorded clip shows.
"""

from __future__ import annotations

TEXT_TO_POSE = (
    "{caption} Can you give the SMPL pose of this person?",
    "{caption} What is the pose in SMPL?",
    "{caption} Please show me this body.",
    "Here is a person: {caption} Give me the SMPL pose.",
    "{caption} Turn these words into a pose, please.",
    "I think of this pose. {caption} Could you show it?",
    "{caption} How does this body look in 3D?",
    "Please make a pose from the words: {caption}",
    "{caption} Return the SMPL parameters.",
)
IMAGE_TO_POSE = (
    "Can you give the SMPL pose of the person in this picture?",
    "What is the pose of the person in the image?",
    "Please estimate the SMPL pose of the person shown here.",
    "Return the 3D pose of the body in this picture.",
    "There is a person in the image. How does the body look in 3D?",
)
PERSON_TO_POSE = (
    "{caption} Can you give the SMPL pose of this person?",
    "{caption} What is the SMPL pose of this person in the image?",
    "Find this person in the picture. {caption} How does the body look in 3D?",
    "{caption} Please estimate the pose of this person.",
)
"""What a person in an image looks like or does, so that the person is told from the others."""
POSE_ANSWERS = (
    "<POSE>",
    "Sure, it is <POSE>.",
    "The pose is <POSE>.",
    "Here it is: <POSE>.",
    "Of course, the SMPL pose is <POSE>.",
    "This is the body: <POSE>.",
    "Yes, the pose of this person is <POSE>.",
    "I would say <POSE>.",
)
EDIT_QUESTIONS = ("Now {edit}.", "And what if you {edit}?", "Please {edit} and keep the rest.")
CHANGES = (
    "{change}",
    "{change} What is the pose then?",
    "Change the pose like this: {change}",
    "From there on: {change}",
)
EDIT_ANSWERS = ("<POSE>", "Now it is <POSE>.", "The new pose is <POSE>.", "With this change it is <POSE>.")
DESCRIBE = (
    "Describe the pose in words.",
    "Can you say in words how the body is held?",
    "What does the body do, part by part?",
)
SUMMARISE = ("What is this person doing?", "Say in a few words what the person does.", "Which posture is it?")
ARMS = ("Where are the arms?", "What are the arms doing?", "How does the person hold the arms?")
MOTIONS = (
    "A moment of this motion: {motion}.",
    "The person is in the middle of this: {motion}.",
    "The motion is {motion}.",
)
"""What a clip shows, before a caption."""
MOTION_TO_POSE = (
    "Show me a moment of this motion: {motion}.",
    "What pose can a person have during this: {motion}?",
    "Imagine a person in the middle of this: {motion}. What is the SMPL pose?",
    "Can you show how a body looks in this motion: {motion}?",
)


def caption_in(question: str) -> str:
    """The caption in a question of ``TEXT_TO_POSE``. Of any other question, all words."""
    for template in TEXT_TO_POSE:
        before, _, after = template.partition("{caption}")
        if question.startswith(before) and question.endswith(after):
            return question[len(before) : len(question) - len(after)]
    return question
