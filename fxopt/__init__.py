"""fxopt: a ``torch.compile`` backend that rewrites transformers with the dynamic-compute techniques of the papers.

torch.compile(model, backend="fxopt")
fxopt.compile(model, fxopt.LayerSkip(speedup=1.5))      # in place; Hugging Face's generate() reaches it
print(fxopt.report().summary())                         # what was rewritten, where, and why not elsewhere
"""

from __future__ import annotations

import pathlib as _pathlib

_root = _pathlib.Path(__file__).resolve().parent.parent
if not (_root / "fxopt" / "passes").exists() and (_root / "passes").exists():
    # A bare checkout: passes/ and codegen/ lie beside fxopt/ and are packages below it once installed.
    __path__.append(str(_root))

from fxopt.compiler import compile  # noqa: E402
from fxopt.evaluation import evaluate  # noqa: E402
from fxopt.meaning import reference  # noqa: E402
from fxopt.passes.async_softmax import AsyncSoftmax  # noqa: E402
from fxopt.passes.cache_extent import CacheExtent  # noqa: E402
from fxopt.passes.cpu_linear import CpuLinear  # noqa: E402
from fxopt.passes.early_exit import EarlyExit  # noqa: E402
from fxopt.passes.flat_gemm import FlatGemm  # noqa: E402
from fxopt.passes.gqa_packing import GqaPacking  # noqa: E402
from fxopt.passes.layer_skip import LayerSkip  # noqa: E402
from fxopt.passes.mask_structure import MaskStructure  # noqa: E402
from fxopt.passes.mixture_of_depths import MixtureOfDepths  # noqa: E402
from fxopt.passes.sparse_attention import SparseAttention  # noqa: E402
from fxopt.passes.technique import PassError, SettingError, Technique  # noqa: E402
from fxopt.planning import plan  # noqa: E402
from fxopt.recipe import Recipe  # noqa: E402
from fxopt.reporting import Report, report, reports  # noqa: E402
from fxopt.speculation import generate  # noqa: E402
from fxopt.tuning import tune  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AsyncSoftmax",
    "CacheExtent",
    "CpuLinear",
    "EarlyExit",
    "FlatGemm",
    "GqaPacking",
    "LayerSkip",
    "MaskStructure",
    "MixtureOfDepths",
    "PassError",
    "Recipe",
    "Report",
    "SettingError",
    "SparseAttention",
    "Technique",
    "compile",
    "evaluate",
    "generate",
    "plan",
    "reference",
    "report",
    "reports",
    "tune",
]
