"""Runs commands of `fire`, given as JSON, one after the other."""

import json
import sys

from modeling_fire.cli import app


for command in json.loads(sys.argv[1]):
    app(command, standalone_mode=False)
