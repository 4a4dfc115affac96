"""Count the kernels of a decoding step and of a round at the shapes of real models, without a GPU.

    python tests/tools/count_kernels.py [-o FILE.json]

On torch's fake CUDA tensors, which have shapes and no numbers: what would be launched, by the model's own layers and by
fused kernels. A product counts as one, whatever cuBLAS makes of it.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import torch
import transformers
from gpu.fake import faked, launches
from gpu.guard import register_guard

from probekit.models.synthetic import SHAPES

NAMES = ("llama-3-8b", "llama-3.2-1b")
DRAFTS = 4


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("-o", "--output", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if (problem := register_guard(Path(folder))) is not None:
            raise SystemExit(problem)
        rows = []
        for shape in NAMES:
            layers = SHAPES[shape].layers
            for fused in (False, True):
                with faked():
                    step, round_ = (launches(fused, shape=shape, draft_length=length) for length in (0, DRAFTS))
                    more, fewer = (launches(fused, shape=shape, layers=each).number for each in (layers, layers // 2))
                row = {
                    "shape": shape, "fused": fused, "autoregressive": step.number,
                    "a_layer": (more - fewer) / (layers - layers // 2), "exit_layer": layers // 8, "drafts": DRAFTS,
                    "round": round_.number,
                }  # fmt: skip
                rows.append(row)
                print(row)
    if given.output is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        document = {"schema": "probekit/kernel-counts/1", "device": "fake CUDA", "dtype": "bfloat16",
                    "versions": versions, "rows": rows}  # fmt: skip
        given.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
