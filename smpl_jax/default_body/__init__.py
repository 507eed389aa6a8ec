"""A body for machines without a licensed one: SMPL's file format, our own shape, no third-party data.

`body.npz` is what `smpl_jax.io.load_body()` reads; `python -m smpl_jax.default_body.generate` makes it.
"""
