"""Changes of a generated pose, and the words for them."""

from __future__ import annotations

# A place of ``families.ARMS`` for one arm or both, or angles of trunk and head in degrees.
ARM_EDITS: dict[str, tuple[str, str]] = {  # family: (words for one arm, words for both)
    "up": ("raise the {side} arm above the head", "raise both arms above the head"),
    "side": ("stretch the {side} arm out to the side", "stretch both arms out to the sides"),
    "forward": ("reach forward with the {side} arm", "reach forward with both arms"),
    "hip": ("put the {side} hand on the hip", "put both hands on the hips"),
    "down": ("let the {side} arm hang down", "let both arms hang down"),
    "head": ("put the {side} hand to the head", "put both hands to the head"),
}
BODY_EDITS: dict[str, dict[str, float]] = {
    "turn the head to the left": {"head_turn": 45},
    "turn the head to the right": {"head_turn": -45},
    "look down": {"head_flexion": 32},
    "look up": {"head_flexion": -30},
    "bend the trunk to the left": {"trunk_bend": 22},
    "bend the trunk to the right": {"trunk_bend": -22},
}
