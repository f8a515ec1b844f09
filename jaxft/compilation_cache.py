"""Compiled programs on disk, so that a second run starts without compiling."""

from __future__ import annotations

import jax

from jaxft.fetch import cache_dir


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent cache in jaxft's cache folder, where the user has not chosen a folder.

    `JAX_COMPILATION_CACHE_DIR` is another folder, `JAX_ENABLE_COMPILATION_CACHE=false` switches the cache off. Commands
    and the trainer call this; importing jaxft does not.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is None and settings["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
