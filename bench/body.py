"""Body forward and forward + backward against smplx (PyTorch) and body-models (PyTorch and JAX), as paired ratios in
one run.

    python bench/body.py [--batch 1 32 1024] [--json out.json]

The model is random, in SMPL's exact format, made on the fly. Inputs are axis-angle poses (B, 24, 3) and shapes (B, 10);
the gradient is that of a random projection of the vertices. A ratio is the peer's time over ours: above 1, we are
faster. Peers that are not installed are named and left out.
"""

import argparse
import json
import pickle
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pairs import paired, repeat

from smpl_jax import axis_angle_to_matrix, joints, load_body, vertices

Timed = Callable[[], object]
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]


def random_smpl(path: Path, num_vertices: int = 6890) -> None:
    """Write a random model with SMPL's shapes, four weights a vertex."""
    rng = np.random.default_rng(0)
    weights = np.zeros((num_vertices, 24))
    np.put_along_axis(weights, rng.integers(0, 24, (num_vertices, 4)), rng.uniform(0.1, 1, (num_vertices, 4)), axis=1)
    regressor = rng.random((24, num_vertices)) * (rng.random((24, num_vertices)) < 0.01)
    arrays = {
        "v_template": rng.normal(0, 0.4, (num_vertices, 3)),
        "shapedirs": rng.normal(0, 0.01, (num_vertices, 3, 10)),
        "posedirs": rng.normal(0, 0.002, (num_vertices, 3, 207)),
        "weights": weights / weights.sum(1, keepdims=True),
        "J_regressor": regressor / regressor.sum(1, keepdims=True),
    }
    content = {k: v.astype(np.float32) for k, v in arrays.items()}
    content |= {
        "f": rng.integers(0, num_vertices, (13776, 3)).astype(np.uint32),
        "kintree_table": np.array([PARENTS, range(24)]),
    }
    path.write_bytes(pickle.dumps(content))


def jax_timed(
    function: Callable[..., jax.Array], pose: np.ndarray, betas: np.ndarray, g: np.ndarray
) -> tuple[Timed, Timed]:
    arguments = jnp.asarray(pose), jnp.asarray(betas)
    weight = jnp.asarray(g)
    forward = jax.jit(function)
    backward = jax.jit(jax.grad(lambda p, b, w: jnp.vdot(function(p, b), w), argnums=(0, 1)))
    return lambda: jax.block_until_ready(forward(*arguments)), lambda: jax.block_until_ready(
        backward(*arguments, weight)
    )


def torch_timed(function: Callable, pose: np.ndarray, betas: np.ndarray, g: np.ndarray) -> tuple[Timed, Timed]:
    import torch

    arguments = tuple(torch.tensor(x, requires_grad=True) for x in (pose, betas))
    weight = torch.tensor(g)

    def forward() -> object:
        with torch.no_grad():
            return function(*arguments)

    return forward, lambda: torch.autograd.grad((function(*arguments) * weight).sum(), arguments)


def peers(
    path: Path, pose: np.ndarray, betas: np.ndarray, g: np.ndarray
) -> Iterator[tuple[str, tuple[Timed, Timed] | None]]:
    """Each peer's name, and its forward and forward + backward; ``None`` where it is not installed."""
    name = "smplx (torch)"
    try:
        import smplx
        import torch
    except ImportError:
        yield name, None
    else:
        layer = smplx.SMPL(str(path), batch_size=1)
        transl = torch.zeros(len(pose), 3)

        def smplx_vertices(p, b):  # type: ignore[no-untyped-def]
            return layer(
                betas=b, global_orient=p[:, :1].flatten(1), body_pose=p[:, 1:].flatten(1), transl=transl
            ).vertices

        yield name, torch_timed(smplx_vertices, pose, betas, g)
    for backend, timed in (("torch", torch_timed), ("jax", jax_timed)):
        name = f"body-models ({backend})"
        try:
            module = __import__(f"body_models.smpl.{backend}", fromlist=["SMPL"])
        except ImportError:
            yield name, None
        else:
            peer = module.SMPL(model_path=path)
            yield (
                name,
                timed(
                    lambda p, b, peer=peer: peer.forward_vertices(p[:, 1:], pelvis_rotation=p[:, 0], shape=b),
                    pose,
                    betas,
                    g,
                ),
            )  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--want", type=int, default=5, help="quiet pairs for each figure")
    parser.add_argument("--tries", type=int, default=25, help="pairs to time at most for each figure")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for a quiet moment")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "SMPL_NEUTRAL.pkl"
    random_smpl(path)
    body = load_body(path)
    rows = []
    print(
        f"{platform.machine()}, {jax.default_backend()}, jax {jax.__version__}; "
        "least ms a call, ratio = peer / ours (median of quiet pairs)"
    )
    for batch in arguments.batch:
        rng = np.random.default_rng(batch)
        inputs = tuple(
            rng.normal(0, s, (batch, *n)).astype(np.float32) for s, n in ((0.3, (24, 3)), (1, (10,)), (1, (6890, 3)))
        )
        ours = jax_timed(lambda p, b: vertices(body, axis_angle_to_matrix(p), b), *inputs)
        only_joints = jax_timed(lambda p, b: joints(body, axis_angle_to_matrix(p), b), *inputs[:2], inputs[2][:, :24])
        rivals: list[tuple[str, tuple[Timed, Timed] | None]] = [
            *peers(path, *inputs),
            ("smpl_jax, joints only", only_joints),
        ]
        for name, timed in rivals:
            if timed is None:
                print(f"{name} is not installed: left out")
                continue
            for what, theirs, mine in zip(("forward", "forward + backward"), timed, ours):
                (block_a, count_a), (block_b, count_b) = repeat(theirs), repeat(mine)
                result = paired(
                    block_a, block_b, want=arguments.want, tries=arguments.tries, patience=arguments.patience
                )
                scale = count_b / count_a
                row = {
                    "batch": batch,
                    "what": what,
                    "peer": name,
                    "peer_ms": 1000 * result.best[0] / count_a,
                    "ours_ms": 1000 * result.best[1] / count_b,
                    "ratio": scale * result.ratio,
                    "spread": [scale * s for s in result.spread],
                    "quiet_pairs": len(result.pairs) if result.tried > 0 else 0,
                    "pairs": abs(result.tried),
                }
                rows.append(row)
                print(
                    f"B={batch:<5} {what:<19} {name:<22} {row['peer_ms']:9.3f} vs {row['ours_ms']:9.3f}   ratio {row['ratio']:6.2f} "
                    f"[{row['spread'][0]:.2f}-{row['spread'][1]:.2f}], {row['quiet_pairs']} quiet of {row['pairs']}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    folder.cleanup()


if __name__ == "__main__":
    main()
