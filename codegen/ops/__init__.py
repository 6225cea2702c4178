"""Semantic operators: what a rewrite means, as one node, until a kernel or Inductor takes it over.

Each operator is a native PyTorch function (its meaning, and what runs where no kernel does), an explicit fake and a
tolerance. They are defined with ``torch.library.Library`` rather than ``custom_op``: a call costs 30 instead of 130
microseconds, which a decode step pays once for every layer.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
"""The registry that owns ``torch.ops.fxopt``; it lives as long as the process."""
