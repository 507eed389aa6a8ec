"""The default body's skin, as a signed distance: negative inside, metres, floor at y = 0, y up, z forward, T-pose.

Trunk, limbs, feet and palms are lofts: an axis with stations that give a centre and four radii, joined by monotone
cubics. The other parts are ellipsoids and round cones. Polynomial smooth unions join the parts. All numbers are our own,
chosen by eye and by circumference (see `docs/body-default.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]
Field = NDArray[np.float32]


def smooth_min(a: Field, b: Field, k: float) -> Field:
    """Polynomial smooth union of two distances; surfaces nearer than `k` blend."""
    h = np.maximum(np.float32(k) - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * np.float32(0.25 / k)


def smooth_cut(a: Field, b: Field, k: float) -> Field:
    """`a` without `b`."""
    return -smooth_min(-a, b, k)


def ellipsoid(
    p: Points, center: Sequence[float], radii: Sequence[float], tilt: NDArray[np.float64] | None = None
) -> Field:
    """Distance (first order) to an ellipsoid; `tilt` (3, 3) has its axes as rows."""
    q = p - np.asarray(center, np.float32)
    if tilt is not None:
        q = q @ tilt.T.astype(np.float32)
    r = np.asarray(radii, np.float32)
    q = q / r
    k0 = np.sqrt((q * q).sum(-1))
    q = q / r
    k1 = np.sqrt((q * q).sum(-1))
    return k0 * (k0 - 1) / np.maximum(k1, np.float32(1e-6))


def round_cone(p: Points, a: Sequence[float], b: Sequence[float], ra: float, rb: float) -> Field:
    """Distance to a segment whose radius goes from `ra` at a to `rb` at b."""
    pa, ba = p - np.asarray(a, np.float32), np.asarray(b, np.float32) - np.asarray(a, np.float32)
    t = ((pa @ ba) / (ba @ ba)).clip(0, 1)
    d = pa - t[:, None] * ba
    return np.sqrt((d * d).sum(-1)) - (np.float32(ra) + t * np.float32(rb - ra))


class Loft:
    """A tube along one axis whose section has its own radius in each of four directions.

    Args:
        axis: 0, 1 or 2, the coordinate that runs along the tube.
        stations: rows of (position, center u, center v, +u radius, -u radius, +v radius, -v radius); (u, v) are the
            other two coordinates in order.
        power: 2 for ellipses, more for boxier sections.
        caps: how far the rounded ends reach beyond the first and the last station.
    """

    def __init__(
        self,
        axis: int,
        stations: Sequence[Sequence[float]],
        power: float = 2.0,
        caps: tuple[float, float] = (0.03, 0.03),
    ):
        from scipy.interpolate import PchipInterpolator

        table = np.array(stations, np.float64)
        self.axis, self.power, self.caps = axis, power, caps
        self.u, self.v = [k for k in range(3) if k != axis]
        self.low, self.high = table[0, 0], table[-1, 0]
        self.knots = np.linspace(self.low, self.high, 512)
        self.curves = PchipInterpolator(table[:, 0], table[:, 1:])(self.knots)

    def __call__(self, p: Points) -> Field:
        t = p[:, self.axis]
        cu, cv, up, um, vp, vm = (np.interp(t, self.knots, c).astype(np.float32) for c in self.curves.T)
        u, v = p[:, self.u] - cu, p[:, self.v] - cv
        ru, rv = np.where(u > 0, up, um), np.where(v > 0, vp, vm)
        beyond = np.where(t < self.low, (t - self.low) / self.caps[0], np.maximum(t - self.high, 0) / self.caps[1])
        rw = np.where(t < self.low, np.float32(self.caps[0]), np.float32(self.caps[1]))
        n = np.float32(self.power)
        parts = [(np.abs(u) / ru, ru), (np.abs(v) / rv, rv), (np.abs(beyond).astype(np.float32), rw)]
        if n == 2:
            k0 = np.sqrt(sum(a * a for a, _ in parts)) + np.float32(1e-6)
            slope = np.sqrt(sum((a / r) ** 2 for a, r in parts)) / k0
        else:
            k0 = sum(a**n for a, _ in parts) ** (1 / n) + np.float32(1e-6)
            slope = np.sqrt(sum((a ** (n - 1) / r) ** 2 for a, r in parts)) / k0 ** (n - 1)
        return (k0 - 1) / np.maximum(slope, np.float32(1.0))


def _trunk_stations() -> list[tuple[float, ...]]:
    # height, half width, front, back, centre line
    rows = [
        (0.845, 0.100, 0.070, -0.086, -0.004),
        (0.875, 0.146, 0.090, -0.112, -0.004),
        (0.920, 0.170, 0.098, -0.122, -0.004),
        (0.970, 0.168, 0.100, -0.108, -0.002),
        (1.020, 0.157, 0.101, -0.096, 0.002),
        (1.075, 0.148, 0.103, -0.088, 0.004),
        (1.125, 0.147, 0.104, -0.092, 0.004),
        (1.190, 0.153, 0.107, -0.104, 0.000),
        (1.260, 0.158, 0.112, -0.112, -0.004),
        (1.320, 0.162, 0.107, -0.116, -0.010),
        (1.370, 0.156, 0.086, -0.110, -0.014),
        (1.410, 0.130, 0.060, -0.096, -0.018),
        (1.445, 0.084, 0.040, -0.080, -0.020),
        (1.475, 0.056, 0.037, -0.068, -0.016),
        (1.515, 0.050, 0.043, -0.062, -0.010),
        (1.570, 0.050, 0.050, -0.062, -0.006),
    ]
    return [(y, 0.0, c, a, a, f - c, c - b) for y, a, f, b, c in rows]


def _leg_stations() -> list[tuple[float, ...]]:
    # height, centre x, centre z, lateral, medial, front, back
    return [
        (0.045, 0.096, -0.022, 0.0315, 0.0315, 0.0357, 0.0357),
        (0.085, 0.096, -0.022, 0.0315, 0.0315, 0.0357, 0.0378),
        (0.130, 0.096, -0.022, 0.0305, 0.0305, 0.0336, 0.0368),
        (0.190, 0.097, -0.018, 0.0357, 0.0357, 0.0368, 0.0451),
        (0.260, 0.099, -0.012, 0.0473, 0.0462, 0.0431, 0.0609),
        (0.330, 0.100, -0.006, 0.0546, 0.0525, 0.0473, 0.0704),
        (0.390, 0.101, -0.002, 0.0536, 0.0525, 0.0494, 0.0672),
        (0.440, 0.101, 0.004, 0.0504, 0.0504, 0.0525, 0.0578),
        (0.492, 0.101, 0.008, 0.0515, 0.0525, 0.0578, 0.0536),
        (0.545, 0.100, 0.006, 0.0551, 0.0562, 0.0624, 0.0562),
        (0.620, 0.100, 0.002, 0.0645, 0.0645, 0.077, 0.0666),
        (0.700, 0.099, 0.000, 0.0728, 0.0759, 0.0884, 0.079),
        (0.780, 0.097, -0.002, 0.075, 0.082, 0.091, 0.088),
        (0.840, 0.095, -0.004, 0.078, 0.083, 0.092, 0.098),
        (0.900, 0.094, -0.008, 0.076, 0.074, 0.084, 0.100),
        (0.950, 0.092, -0.008, 0.066, 0.060, 0.070, 0.086),
    ]


def _arm_stations() -> list[tuple[float, ...]]:
    # x, centre y, centre z, up, down, front, back
    return [
        (0.110, 1.372, -0.018, 0.046, 0.056, 0.056, 0.062),
        (0.150, 1.386, -0.018, 0.048, 0.060, 0.056, 0.060),
        (0.190, 1.396, -0.018, 0.051, 0.060, 0.055, 0.058),
        (0.230, 1.398, -0.018, 0.0519, 0.0562, 0.0551, 0.0583),
        (0.280, 1.398, -0.019, 0.0466, 0.0498, 0.0509, 0.053),
        (0.335, 1.398, -0.020, 0.0435, 0.0466, 0.0498, 0.0498),
        (0.390, 1.398, -0.022, 0.0403, 0.0424, 0.0445, 0.0456),
        (0.440, 1.398, -0.022, 0.0371, 0.0382, 0.0392, 0.0424),
        (0.480, 1.398, -0.020, 0.0382, 0.0382, 0.0424, 0.0424),
        (0.525, 1.398, -0.018, 0.0371, 0.0382, 0.0424, 0.0413),
        (0.590, 1.398, -0.016, 0.0307, 0.0318, 0.0371, 0.036),
        (0.645, 1.398, -0.014, 0.0244, 0.0254, 0.0318, 0.0318),
        (0.690, 1.398, -0.014, 0.020, 0.020, 0.028, 0.028),
    ]


def _palm_stations() -> list[tuple[float, ...]]:
    return [
        (0.680, 1.398, -0.014, 0.019, 0.019, 0.027, 0.027),
        (0.705, 1.398, -0.012, 0.018, 0.018, 0.033, 0.033),
        (0.735, 1.398, -0.010, 0.016, 0.017, 0.041, 0.038),
        (0.765, 1.397, -0.010, 0.014, 0.015, 0.043, 0.040),
        (0.785, 1.396, -0.010, 0.012, 0.013, 0.041, 0.038),
    ]


def _foot_stations() -> list[tuple[float, ...]]:
    # z, centre x, centre y, lateral, medial, up, down
    return [
        (-0.062, 0.095, 0.030, 0.024, 0.024, 0.028, 0.030),
        (-0.035, 0.096, 0.034, 0.031, 0.031, 0.045, 0.034),
        (0.000, 0.098, 0.036, 0.034, 0.033, 0.052, 0.036),
        (0.040, 0.102, 0.034, 0.037, 0.033, 0.043, 0.034),
        (0.080, 0.107, 0.026, 0.041, 0.037, 0.034, 0.026),
        (0.120, 0.112, 0.020, 0.044, 0.042, 0.024, 0.020),
        (0.150, 0.114, 0.016, 0.042, 0.043, 0.016, 0.016),
    ]


FINGERS = {
    # base, middle joint, tip, radii
    "index": ((0.776, 1.397, 0.022), (0.822, 1.395, 0.029), (0.862, 1.388, 0.034), (0.0100, 0.0088, 0.0070)),
    "middle": ((0.780, 1.398, 0.000), (0.829, 1.396, 0.002), (0.872, 1.388, 0.004), (0.0102, 0.0090, 0.0072)),
    "ring": ((0.776, 1.397, -0.021), (0.822, 1.395, -0.024), (0.862, 1.388, -0.026), (0.0098, 0.0086, 0.0070)),
    "pinky": ((0.768, 1.395, -0.041), (0.802, 1.393, -0.048), (0.832, 1.387, -0.053), (0.0088, 0.0076, 0.0062)),
    "thumb": ((0.716, 1.392, 0.016), (0.757, 1.386, 0.052), (0.795, 1.382, 0.071), (0.0165, 0.0112, 0.0082)),
}
TOES = (
    ((0.088, 0.015, 0.150), (0.090, 0.013, 0.192), 0.0150, 0.0120),
    ((0.108, 0.013, 0.155), (0.112, 0.011, 0.193), 0.0115, 0.0088),
    ((0.123, 0.012, 0.150), (0.129, 0.010, 0.184), 0.0108, 0.0082),
    ((0.136, 0.011, 0.142), (0.143, 0.010, 0.172), 0.0102, 0.0078),
    ((0.146, 0.011, 0.130), (0.154, 0.009, 0.156), 0.0098, 0.0076),
)


@cache
def _lofts() -> dict[str, Loft]:
    return {
        "trunk": Loft(1, _trunk_stations(), power=2.3, caps=(0.03, 0.04)),
        "leg": Loft(1, _leg_stations(), caps=(0.02, 0.05)),
        "arm": Loft(0, _arm_stations(), caps=(0.03, 0.02)),
        "palm": Loft(0, _palm_stations(), power=2.4, caps=(0.02, 0.008)),
        "foot": Loft(2, _foot_stations(), power=2.3, caps=(0.018, 0.02)),
    }


def _flip(p: Points) -> Points:
    return p * np.array([-1, 1, 1], np.float32)


def _both(part: Callable[[Points], Field], p: Points, k: float) -> Field:
    """A paired part and its mirror image."""
    return smooth_min(part(p), part(_flip(p)), k)


def _leg(p: Points) -> Field:
    d = _lofts()["leg"](p)
    d = smooth_min(d, ellipsoid(p, (0.101, 0.498, 0.044), (0.026, 0.032, 0.020)), 0.03)
    for x, y, z in ((0.070, 0.084, -0.016), (0.123, 0.076, -0.026)):
        d = smooth_min(d, ellipsoid(p, (x, y, z), (0.010, 0.013, 0.012)), 0.02)
    foot = _lofts()["foot"](p)
    foot = smooth_min(foot, ellipsoid(p, (0.095, 0.036, -0.048), (0.031, 0.036, 0.032)), 0.015)
    for a, b, ra, rb in TOES:
        foot = smooth_min(foot, round_cone(p, a, b, ra, rb), 0.007)
    d = smooth_min(d, foot, 0.03)
    # Stand on the floor: cut the sole flat, with a rounded edge.
    return smooth_cut(d, p[:, 1] - np.float32(0.002), 0.008)


def _arm(p: Points) -> Field:
    d = _lofts()["arm"](p)
    d = smooth_min(d, ellipsoid(p, (0.192, 1.404, -0.018), (0.062, 0.048, 0.056)), 0.03)
    hand = _lofts()["palm"](p)
    base, middle, tip, (r0, r1, r2) = FINGERS["thumb"]
    hand = smooth_min(
        hand, smooth_min(round_cone(p, base, middle, r0, r1), round_cone(p, middle, tip, r1, r2), 0.004), 0.014
    )
    for name in ("index", "middle", "ring", "pinky"):
        base, middle, tip, (r0, r1, r2) = FINGERS[name]
        finger = smooth_min(round_cone(p, base, middle, r0, r1), round_cone(p, middle, tip, r1, r2), 0.003)
        hand = smooth_min(hand, finger, 0.006)
    return smooth_min(d, hand, 0.015)


def _tilt(degrees: float, axis: int) -> NDArray[np.float64]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    m = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    m[i, i], m[i, j], m[j, i], m[j, j] = c, -s, s, c
    return m


def _head(p: Points) -> Field:
    def pair(
        center: Sequence[float], radii: Sequence[float], k: float, tilt: NDArray[np.float64] | None = None
    ) -> Field:
        return _both(lambda q: ellipsoid(q, center, radii, tilt), p, k)

    d = ellipsoid(p, (0, 1.629, -0.014), (0.0775, 0.093, 0.096))
    d = smooth_min(d, ellipsoid(p, (0, 1.606, 0.022), (0.066, 0.074, 0.066)), 0.03)
    # Jaw: a narrow lower face, its corners below the ears, the chin in front.
    d = smooth_min(d, ellipsoid(p, (0, 1.555, 0.038), (0.048, 0.046, 0.047)), 0.03)
    d = smooth_min(d, pair((0.041, 1.550, 0.008), (0.014, 0.030, 0.032), 0.01), 0.03)
    d = smooth_min(d, ellipsoid(p, (0, 1.516, 0.068), (0.021, 0.015, 0.020)), 0.03)
    # Cheek bones, sockets, eyes with their lids, brows.
    d = smooth_min(d, pair((0.044, 1.588, 0.056), (0.020, 0.015, 0.020), 0.01), 0.025)
    d = smooth_cut(d, pair((0.031, 1.611, 0.098), (0.017, 0.010, 0.014), 0.004), 0.016)
    d = smooth_min(d, pair((0.0315, 1.6105, 0.0735), (0.0148, 0.0088, 0.0122), 0.004), 0.004)
    d = smooth_min(d, pair((0.031, 1.6295, 0.0755), (0.019, 0.0040, 0.0085), 0.012, _tilt(7, 2)), 0.014)
    nose = round_cone(p, (0, 1.618, 0.083), (0, 1.580, 0.1065), 0.0058, 0.0085)
    nose = smooth_min(nose, pair((0.0105, 1.576, 0.0945), (0.0065, 0.0065, 0.0095), 0.004), 0.008)
    d = smooth_min(d, nose, 0.009)
    # Lips, and the crease between them.
    d = smooth_min(d, ellipsoid(p, (0, 1.554, 0.0840), (0.022, 0.0058, 0.0100)), 0.006)
    d = smooth_min(d, ellipsoid(p, (0, 1.5435, 0.0825), (0.019, 0.0066, 0.0100)), 0.005)
    d = smooth_cut(d, ellipsoid(p, (0, 1.5490, 0.0965), (0.024, 0.0022, 0.0055)), 0.004)
    lean = _tilt(12, 0)
    ear = smooth_cut(
        pair((0.078, 1.600, -0.012), (0.0085, 0.031, 0.0175), 0.01, lean),
        pair((0.089, 1.603, -0.009), (0.0080, 0.019, 0.0095), 0.004, lean),
        0.005,
    )
    return smooth_min(d, ear, 0.007)


def _trunk(p: Points) -> Field:
    d = _lofts()["trunk"](p)
    pairs: list[tuple[tuple[float, ...], tuple[float, ...], float]] = [
        ((0.076, 1.305, 0.064), (0.074, 0.060, 0.046), 0.05),  # pectorals
        ((0.108, 1.275, -0.055), (0.052, 0.115, 0.056), 0.05),  # back
        ((0.078, 0.898, -0.066), (0.078, 0.072, 0.062), 0.05),  # seat
    ]
    for center, radii, k in pairs:
        d = smooth_min(d, _both(partial(ellipsoid, center=center, radii=radii), p, 0.02), k)
    trapezius = lambda q: round_cone(q, (0.026, 1.478, -0.042), (0.150, 1.412, -0.030), 0.028, 0.030)  # noqa: E731
    d = smooth_min(d, _both(trapezius, p, 0.02), 0.035)
    clavicle = lambda q: round_cone(q, (0.022, 1.410, 0.038), (0.150, 1.428, 0.004), 0.008, 0.010)  # noqa: E731
    d = smooth_min(d, _both(clavicle, p, 0.01), 0.018)
    # Spine furrow and navel.
    d = smooth_cut(d, round_cone(p, (0, 1.02, -0.104), (0, 1.30, -0.132), 0.010, 0.010), 0.03)
    return smooth_cut(d, ellipsoid(p, (0, 1.052, 0.104), (0.006, 0.008, 0.010)), 0.010)


def body(p: Points) -> Field:
    """Signed distance (N,) of points (N, 3), exactly symmetric in x."""
    p = np.asarray(p, np.float32)
    d = smooth_min(_trunk(p), _head(p), 0.025)
    d = smooth_min(d, _both(_arm, p, 0.004), 0.035)
    return smooth_min(d, _both(_leg, p, 0.006), 0.028)


def normals(p: Points, step: float = 5e-4) -> Points:
    """Unit gradient (N, 3) of `body`."""
    g = np.stack([body(p + e) - body(p - e) for e in np.eye(3, dtype=np.float32) * np.float32(step)], -1)
    return g / np.maximum(np.linalg.norm(g, axis=-1, keepdims=True), 1e-9)
