"""The data sets that ``chatpose data prepare`` reads, by name."""

from __future__ import annotations

DATA_SETS: dict[str, str] = {}
"""name -> ``package.module:Class`` of its ``Reader``. The name is also that of the source of ``data.sources`` that reads the prepared folder."""
