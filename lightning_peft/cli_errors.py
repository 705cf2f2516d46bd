"""jsonargparse's messages cut down to what was given, where, and what would work."""

import difflib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable

from jsonargparse import import_object  # noqa
