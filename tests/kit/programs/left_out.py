"""Leaves each part out of a checkpoint in turn and goes on from what remains, as a rank does. Prints how.

left_out.py RUN [KEY=VALUE ...]    the folder of a run that was stopped
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from disttrain.config import load_config
from disttrain.errors import DisttrainError
from disttrain.preflight import open_index
from disttrain.runs.manifest import MANIFEST, STATE, entry, latest_valid, write_manifest
from disttrain.training.build import build
from disttrain.training.group import join
from disttrain.training.rank import Rank

config = load_config(Path(sys.argv[1]) / "config.yaml", sys.argv[2:])
sound, _ = latest_valid(Path(sys.argv[1]) / "checkpoints")
assert sound is not None
index, rank, group = open_index(config, print), Rank(0, None), join(config, "cpu")
document = json.loads((sound / STATE).read_bytes())
outcomes = {}
for section, key in [("", ""), *((place, name) for place, names in document.items() for name in names)]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / sound.name
        shutil.copytree(sound, path)
        changed = {name: {k: v for k, v in values.items() if k != key} for name, values in document.items()}
        (path / STATE).write_text(json.dumps(changed))
        if section == "parts":
            (path / f"{key}.safetensors").unlink()
        (path / MANIFEST).unlink()
        files = sorted(file for file in path.iterdir())
        write_manifest(path, {file.name: entry(file.name, file.read_bytes()) for file in files})
        try:
            _, position, _ = build(config, rank, group, index, path)
        except DisttrainError as error:
            outcomes[f"{section}.{key}"] = [error.exit_code, str(error)]
        else:
            outcomes[f"{section}.{key}"] = [0, position.step]
print(json.dumps(outcomes), flush=True)
os._exit(0)
