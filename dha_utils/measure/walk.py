"""A walk through the layers of a model that goes on where it was killed: its rows and streams, in one file."""

import json
import os
import time

from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .stream import each_layer

SAVE_SECONDS = 60  # of work that a walk may lose


class Walk:
    """`rows`, one per layer done, whatever JSON can say; `streams` {name: tensor} behind the last of them, None at first.

    Both are read from `file`, if it is there: the results of a layer depend on nothing else.
    """

    def __init__(self, file):
        self.file, self.rows, self.streams, self.saved = file, [], None, time.monotonic()
        if file.is_file():
            with safe_open(file, "pt") as opened:
                self.rows = json.loads(opened.metadata()["rows"])
                self.streams = {name: opened.get_tensor(name) for name in opened.keys()}

    def bar(self, model, name):
        """The layers that are left, as of `each_layer`, under a progress bar."""
        layers = len(model.model.layers)
        left = each_layer(model, range(len(self.rows), layers))
        return tqdm(left, name, layers, initial=len(self.rows), unit="layer")

    def add(self, row, streams):
        """The row of the next layer, and the streams behind it; kept in the file if the last time is long ago."""
        self.rows.append(row)
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save(streams)

    def save(self, streams):
        partial = self.file.with_name(f".{self.file.name}.partial")
        save_file({name: stream.contiguous() for name, stream in streams.items()}, partial, {"rows": json.dumps(self.rows)})
        os.replace(partial, self.file)
        self.saved = time.monotonic()
