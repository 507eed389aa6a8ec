"""Fits people to their own projections: how near, and how fast. The tables of docs/fit.md.

    JAX_PLATFORMS=cpu python bench/fit.py [--people 200] [--motion FOLDER] [--peer 8] [--json out.json]

Poses are of the generated set, drawn with a seed that the prior was not fitted to; with --motion of the clips in FOLDER (BVH, ASF/AMC) instead. Each
person is seen from a random side, about 750 pixels high, in an image of 1000 pixels, by a known camera. The keypoints are OpenPose's 25.
PA-MPJPE is over SMPL's 24 joints, after a similarity.

--peer N fits N people by smplx and PyTorch's L-BFGS too, written the obvious way: the whole mesh posed for every evaluation, the same terms and the
same prior, two starts (front and back), SMPLify's stages. It needs the packages smplx and torch. Seconds are of the processor, of all threads:
those of the clock measure the neighbours on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import smpl_jax
from chatpose_jax.data.synthetic.families import sample_poses
from smpl_jax import axis_angle_to_matrix, load_body, load_body_arrays, pa_mpjpe
from smpl_jax.fit import fit_keypoints, load_prior
from smpl_jax.keypoints import locate
from smpl_jax.layer import _VERTEX_JOINTS
from smpl_jax.mocap import SUFFIXES, read_clip, retarget

SIZE, FOCAL, SEED, SET = 1000, 1200.0, 77, "openpose25"
_IN_SMPLX = [24, 12, 17, 19, 21, 16, 18, 20, 0, 2, 5, 8, 1, 4, 7, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34]


class People(NamedTuple):
    """joints: (N, 24, 3) metres in the camera frame. pixels: (N, 25, 2)."""

    joints: np.ndarray
    pixels: np.ndarray


def people(count: int, motion: Path | None, shaped: bool) -> People:
    """Posed bodies and their projections; `shaped`: betas drawn from a normal distribution, cut at 2, else 0."""
    rng = np.random.default_rng(SEED)
    if motion is None:
        rotations = np.array(sample_poses(count, SEED).rotations, np.float64)
    else:
        files = sorted(file for file in motion.iterdir() if file.suffix in SUFFIXES)
        frames = np.concatenate([retarget(read_clip(file)).rotations for file in files])
        rotations = np.array(frames[rng.choice(len(frames), count, replace=False)], np.float64)
    turns = np.zeros((2, count, 3))
    turns[0, :, 1], turns[1, :, 0] = rng.uniform(-np.pi, np.pi, count), rng.normal(0, 0.25, count)
    yaw, pitch = np.asarray(axis_angle_to_matrix(turns))
    rotations[:, 0] = np.diag([1.0, -1, -1]) @ pitch @ yaw @ rotations[:, 0]
    betas = rng.normal(size=(count, 10)).clip(-2, 2) * shaped
    body = load_body()
    points = np.asarray(locate(body, SET)(rotations, betas), np.float64)
    low, high = points.min(1), points.max(1)
    place = -(low + high) / 2
    place[:, 2] += FOCAL * (high - low)[:, :2].max(1) / (0.75 * SIZE)
    points = points + place[:, None]
    joints = np.asarray(smpl_jax.joints(body, rotations, betas, place))
    return People(joints, points[..., :2] / points[..., 2:] * FOCAL + SIZE / 2)


def ours(given: People, pixels: np.ndarray, betas: np.ndarray | None) -> dict[str, Any]:
    wall, busy = time.perf_counter(), time.process_time()
    fit = fit_keypoints(pixels, SET, image_size=(SIZE, SIZE), focal=FOCAL, betas=betas)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    joints = smpl_jax.joints(load_body(), fit.pose.rotations, fit.pose.betas, fit.pose.translation)
    return row(np.asarray(pa_mpjpe(joints, given.joints)), wall, busy) | {"converged": float(fit.converged.mean())}


def row(errors: np.ndarray, wall: float, busy: float) -> dict[str, Any]:
    mean, median, most = (round(float(x), 1) for x in (errors.mean(), np.median(errors), np.percentile(errors, 90)))
    return {"PA-MPJPE": mean, "median": median, "90 %": most, "wall s": round(wall, 1), "processor s": round(busy, 1)}


def peer(given: People, pixels: np.ndarray) -> dict[str, Any]:
    """smplx and torch.optim.LBFGS, all people as one problem; the shape is known."""
    import smplx
    import torch

    arrays = load_body_arrays()
    content = {name: arrays[name] for name in ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f")}
    content["kintree_table"] = np.stack([arrays["parents"], np.arange(24)])
    ids = dict(load_body().vertex_ids)
    count = len(pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "SMPL_NEUTRAL.pkl")
        path.write_bytes(pickle.dumps(content))
        names = {theirs: ids[mine] for theirs, mine in _VERTEX_JOINTS.items()}
        model = smplx.create(str(path), "smpl", vertex_ids=names, batch_size=count, num_betas=10)
    prior = load_prior()
    means, whiten, offsets = (torch.tensor(np.asarray(x)) for x in (prior.means, prior.whiten, prior.offsets))
    aim = torch.tensor(pixels, dtype=torch.float32)

    def energy(root: Any, pose: Any, place: Any, noise: float, which: Any = None) -> Any:
        hands = torch.zeros(count, 6)
        out = model(global_orient=root, body_pose=torch.cat([pose, hands], 1), transl=place).joints[:, _IN_SMPLX]
        apart = (
            (out[..., :2] / out[..., 2:].clamp_min(0.1) * FOCAL + SIZE / 2 - aim)
            * place[:, 2].detach()[:, None, None]
            / FOCAL
        )
        square = (apart**2).sum(-1)
        data = (square / (1 + square / 0.15**2) / (2 * noise**2))[:, slice(None) if which is None else which].sum(1)
        white = torch.einsum("kij,nkj->nki", whiten, pose[:, None] - means)
        prior_energy = (0.5 * (white**2).sum(-1) + offsets).min(1).values
        bends = torch.stack([pose[:, 52], -pose[:, 55], -pose[:, 9], -pose[:, 12]], 1)
        return data + 0.1 * prior_energy + 0.1 * torch.exp(4 * bends.clamp(-5, 2)).sum(1)

    wall, busy = time.perf_counter(), time.process_time()
    torso = [2, 5, 9, 12]
    results = []
    for start in ((np.pi, 0.0, 0.0), (0.0, 0.0, np.pi)):  # facing the camera, and turned away from it
        root = torch.tensor(start, dtype=torch.float32).repeat(count, 1).requires_grad_()
        pose = means[0].repeat(count, 1).clone().requires_grad_()
        high = (aim[..., 1].max(1).values - aim[..., 1].min(1).values).clamp_min(50)
        place = torch.stack([0 * high, 0 * high, 1.6 * FOCAL / high], 1).requires_grad_()
        everything = [root, place, pose]
        stages = (
            ([root, place], 0.03, torso),
            (everything, 0.03, None),
            (everything, 0.01, None),
            (everything, 0.003, None),
        )
        for free, noise, which in stages:
            optimizer = torch.optim.LBFGS(free, max_iter=60, line_search_fn="strong_wolfe")

            def closure() -> Any:
                optimizer.zero_grad()  # noqa: B023 - called at once
                loss = energy(root, pose, place, noise, which).sum()  # noqa: B023
                loss.backward()
                return loss

            optimizer.step(closure)
        with torch.no_grad():
            hands = torch.zeros(count, 6)
            joints = model(global_orient=root, body_pose=torch.cat([pose, hands], 1), transl=place).joints[:, :24]
            results.append((energy(root, pose, place, 0.01).numpy(), joints.numpy()))
    (first, a), (second, b) = results
    joints = np.where((first < second)[:, None, None], a, b)
    return row(np.asarray(pa_mpjpe(joints, given.joints)), time.perf_counter() - wall, time.process_time() - busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--motion", type=Path)
    parser.add_argument("--peer", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {args.people} people, {args.motion or 'generated set'}")
    table: dict[str, Any] = {}
    rng = np.random.default_rng(SEED + 1)
    for shaped in (False, True):
        given = people(args.people, args.motion, shaped)
        for noise in (0.0, 5.0):
            pixels = given.pixels + noise * rng.normal(size=given.pixels.shape)
            betas = None if shaped else np.zeros(10)
            name = f"shape {'fitted' if shaped else 'known'}, {noise:g} px"
            if not table:
                table["compile"] = ours(given, pixels, betas)
                print("first call", table["compile"], flush=True)
            table[name] = ours(given, pixels, betas)
            print(name, table[name], flush=True)
            if args.peer and not shaped:
                few = People(given.joints[: args.peer], given.pixels[: args.peer])
                ours(few, pixels[: args.peer], betas)
                for who, result in (
                    ("ours", ours(few, pixels[: args.peer], betas)),
                    ("smplx + torch", peer(few, pixels[: args.peer])),
                ):
                    table[f"{who}, {args.peer} people, {name}"] = result
                    print(f"{who}, {args.peer} people, {name}", result, flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
