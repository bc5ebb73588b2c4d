"""Runs the command line as `python -m llava_phi_export`."""

import sys

from .cli import main

sys.exit(main())
