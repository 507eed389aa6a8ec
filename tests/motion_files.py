"""Writes small files of motion capture, as other programs write them."""

import itertools

import numpy as np

AXES = np.eye(3)
SPINE = ("Hips", "Spine", "Spine1", "Spine2")


def tree(prefix=""):
    """(name, parent, offset) of a T-pose in centimetres, x left, y up, z forward."""
    rows = [("Hips", "", (0, 0, 0))]
    rows += [(name, parent, (0, 12, 0)) for parent, name in itertools.pairwise(SPINE)]
    rows += [("Neck", "Spine2", (0, 20, 0)), ("Head", "Neck", (0, 10, 0))]
    for side, sign in (("Left", 1), ("Right", -1)):
        for name, parent, offset in (
            ("UpLeg", "Hips", (9, -8, 0)), ("Leg", "UpLeg", (0, -40, 0)), ("Foot", "Leg", (0, -40, 0)), ("ToeBase", "Foot", (0, -5, 13)),
            ("Shoulder", "Spine2", (6, 15, 0)), ("Arm", "Shoulder", (12, 0, 0)), ("ForeArm", "Arm", (26, 0, 0)), ("Hand", "ForeArm", (25, 0, 0)),
        ):  # fmt: skip
            above = parent if parent in SPINE else f"{side}{parent}"
            rows.append((f"{side}{name}", above, (sign * offset[0], *offset[1:])))
    return [(prefix + name, prefix + parent if parent else "", offset) for name, parent, offset in rows]


def write_bvh(path, *frames, rows=None, turn=AXES, order="ZXY", seconds="0.01"):
    """A BVH file of frames {joint: angles in degrees, by ``order``}; ``turn`` takes the axes above to the file's."""
    rows = tree() if rows is None else rows
    named, columns = [], [*"XYZ"]

    def write(name, offset, depth):
        channels = " ".join(f"{axis}rotation" for axis in order)
        position = "Xposition Yposition Zposition " if depth == 0 else ""
        named.append(name)
        columns.extend(order)
        inside = "".join(write(child, where, 1) for child, parent, where in rows if parent == name)
        inside = inside or f"End Site {{ OFFSET {' '.join(map(str, turn @ np.array(offset) / 3))} }}"
        where = " ".join(map(str, turn @ np.array(offset)))
        return (
            f"{'JOINT' if depth else 'ROOT'} {name} {{\n OFFSET {where}\n"
            f" CHANNELS {6 - 3 * depth} {position}{channels}\n {inside} }}\n"
        )

    text = "HIERARCHY\n" + write(rows[0][0], rows[0][2], 0)
    lines = [
        " ".join(str(v) for v in (1, 90, 2, *(a for n in named for a in frame.get(n, (0, 0, 0))))) for frame in frames
    ]
    path.write_text(f"{text}MOTION\nFrames: {len(lines)}\nFrame Time: {seconds}\n" + "\n".join(lines) + "\n")
    return path


def _limbs(x):
    """Leg and arm of the side at ``x``, 1 left or -1 right: (name, parent, direction times length)."""
    leg = (("hipjoint", "root", (2 * x, -2, 0)), ("femur", "hipjoint", (0, -7, 0)), ("tibia", "femur", (0, -7, 0)))
    foot = (("foot", "tibia", (0, -1, 2)), ("toes", "foot", (0, 0, 1)))
    arm = (("clavicle", "thorax", (1.5 * x, 1.5, 0)), ("humerus", "clavicle", (5 * x, 0, 0)))
    hand = (("radius", "humerus", (3.5 * x, 0, 0)), ("wrist", "radius", (x, 0, 0)), ("hand", "wrist", (x, 0, 0)))
    return (*leg, *foot, *arm, *hand)


TRUNK = ("root", "lowerback", "upperback", "thorax", "lowerneck", "upperneck", "head")
BONES = [(name, parent, (0.0, 2.0, 0.0)) for parent, name in itertools.pairwise(TRUNK)] + [
    (side + name, parent if parent in TRUNK else side + parent, way)
    for side, x in (("l", 1), ("r", -1))
    for name, parent, way in _limbs(x)
]
"""(name, parent, direction times length) of a skeleton with CMU's names in a T-pose."""


def write_acclaim(folder, clips):
    """``SUBJECT.asf`` and ``SUBJECT_TAKE.amc`` for clips {"02_01": frames}; a frame is {bone: angles x, y, z in degrees}, "root" too."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip, frames in clips.items():
        data = "".join(
            f"begin\n id {number}\n name {name}\n direction {' '.join(map(str, np.array(way) / np.linalg.norm(way)))}\n"
            f" length {np.linalg.norm(way)}\n axis 0 0 0 XYZ\n dof rx ry rz\n limits (-160.0 160.0)\n (-160.0 160.0)\n (-160.0 160.0)\nend\n"
            for number, (name, _, way) in enumerate(BONES, 1)
        )
        children = {parent: [n for n, p, _ in BONES if p == parent] for _, parent, _ in BONES}
        (folder / f"{clip.split('_')[0]}.asf").write_text(
            "# AST/ASF file generated using VICON BodyLanguage\n:version 1.10\n:name VICON\n:units\n mass 1.0\n length 0.45\n angle deg\n"
            ":documentation\n .ast/.asf\n:root\n order TX TY TZ RX RY RZ\n axis XYZ\n position 0 0 0\n orientation 0 0 0\n:bonedata\n"
            f"{data}:hierarchy\nbegin\n{''.join(f'{parent} {chr(32).join(below)}{chr(10)}' for parent, below in children.items())}end\n"
        )
        lines = ["#!OML:ASF F:\\VICON\\USERDATA\\TEST", ":FULLY-SPECIFIED", ":DEGREES"]
        for number, frame in enumerate(frames, 1):
            turns = {name: frame.get(name, (0.1, 0, 0)) for name in ("root", *(name for name, _, _ in BONES))}
            lines.append(str(number))
            lines += [
                f"{name} {'1 17 2 ' if name == 'root' else ''}{' '.join(map(str, way))}" for name, way in turns.items()
            ]
        (folder / f"{clip}.amc").write_text("\r\n".join(lines) + "\r\n")
    return folder
