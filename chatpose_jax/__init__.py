"""ChatPose in JAX: a language model that answers about 3D human pose, with bodies.

>>> import chatpose_jax
>>> model = chatpose_jax.load()  # the toy model of the package  # doctest: +SKIP
>>> model.chat([{"role": "user", "content": "Show me someone who kneels."}]).poses[0].save("kneel.glb")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ChatPose", "Reply", "Stream", "UserError", "__version__", "load"]

if TYPE_CHECKING:
    from chatpose_jax.chat import ChatPose, Reply, Stream, load
    from chatpose_jax.errors import UserError


def __getattr__(name: str) -> Any:
    """The API arrives on first use, so that ``import chatpose_jax.models`` needs neither a tokenizer nor a body."""
    if name in ("ChatPose", "Reply", "Stream", "load"):
        from chatpose_jax import chat

        return getattr(chat, name)
    if name == "UserError":
        from chatpose_jax.errors import UserError

        return UserError
    raise AttributeError(f"module 'chatpose_jax' has no attribute {name!r}")
