"""Prints the strongest level of isolation that this machine has."""

import sys

from .. import BadInput
from .pool import Sandbox

try:
    with Sandbox() as strongest:
        print(strongest.level)
except BadInput as error:
    print(error, file=sys.stderr)
    sys.exit(2)
