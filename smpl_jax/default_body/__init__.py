"""The default body: a body of our own in SMPL's file format, made without third-party data. It needs no licence from SMPL's authors.

`smpl_jax.io.load_body()` reads `body.npz`; `python -m smpl_jax.default_body.generate` makes it.
"""
