"""``python -m chatpose_jax.cli``."""

import sys

from chatpose_jax.cli.main import main

sys.exit(main())
