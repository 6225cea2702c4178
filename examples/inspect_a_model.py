"""What did the compiler do to my model, where, why not there, and is it right?

    python examples/inspect_a_model.py [FOLDER]

Plans and compiles a tiny decoder with one layer skipped, asks a few questions, and writes report.json and report.html
into FOLDER (a new temporary one by default). The page opens from the file, without a network.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import torch

import fxopt
from fxopt.inspection import views
from fxopt.inspection.numerics import numerics
from fxopt.testing import Handwritten


def main(folder: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = Handwritten(layers=4).eval()
    ids = torch.randint(0, 128, (1, 12))
    skip = fxopt.LayerSkip(skip=(2,))

    print("-- before compiling: a dry run on fake tensors")
    print(views.summary(fxopt.plan(model, skip, inputs=(ids,))).text())

    print("\n-- compiled")
    fxopt.compile(model, skip)
    with torch.no_grad():
        model(ids)
    report = fxopt.report(model)
    print(views.summary(report).text())

    for place in ("layers.2", "layers.1", "layer.2"):
        print(f"\n-- why layer_skip at {place}?")
        print(views.why(report, "layer_skip", place).text())

    print("\n-- do the numbers agree with the references?")
    print(numerics(model, (ids,), skip).text())

    views.expect(report, "layer_skip==1, errors==0")
    print(f"\n{report.to_json(folder / 'report.json')}\n{report.to_html(folder / 'report.html')}")


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="fxopt-"))
    target.mkdir(parents=True, exist_ok=True)
    main(target)
