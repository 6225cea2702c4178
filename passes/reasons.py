"""The closed list of reason codes: why a place was not rewritten, in words a user can act on.

``docs/reason_codes.md`` is written from this table (a test compares them) and ``fxopt inspect explain CODE`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One code: `title` in a few words, `meaning` in one sentence, `advice` as the next step."""

    code: str
    title: str
    meaning: str
    advice: str


_ALL = (
    # FX1xx: the graph is built differently from what the pass knows how to rewrite.
    Reason(
        "FX101",
        "operation differs",
        "A node has another operation than the rewrite expects.",
        "Compare the named node with the technique's page; open an issue if the two compute the same.",
    ),
    Reason(
        "FX102",
        "argument differs",
        "A node has the right operation and an argument with another value.",
        "The message names the argument, what was found and what is handled.",
    ),
    Reason(
        "FX103",
        "constant differs",
        "A literal in the graph has a value that the rewrite cannot absorb.",
        "The message names the constant.",
    ),
    Reason(
        "FX104",
        "used elsewhere",
        "An intermediate result is also read outside of the matched region.",
        "Avoid returning or hooking that intermediate (output_attentions, output_hidden_states, forward hooks).",
    ),
    Reason(
        "FX105",
        "crosses a graph",
        "The region is split over several graphs by a graph break.",
        "Find the break with TORCH_LOGS=graph_breaks and remove it.",
    ),
    Reason(
        "FX106",
        "crosses a mutation",
        "A tensor of the region is written in place between its reads.",
        "Use Hugging Face's cache classes, whose writes are understood.",
    ),
    Reason(
        "FX107",
        "already replaced",
        "Another pass rewrote these nodes first.",
        "fxopt inspect shows the earlier pass; disable it if this one matters more.",
    ),
    Reason(
        "FX110",
        "shape changes",
        "A repeated module's output has another shape than its input, so it is no layer.",
        "Layers that can be skipped map a residual stream to the same shape.",
    ),
    Reason(
        "FX111",
        "not chained",
        "Repeated modules do not feed one another through one tensor.",
        "Experts, heads and parallel branches are not a stack of layers; nothing to do.",
    ),
    Reason(
        "FX112",
        "nothing repeated",
        "No container of repeated layers was found in this graph.",
        "Compile the whole model (or the module that loops over its layers) rather than one leaf.",
    ),
    Reason(
        "FX113",
        "part not found",
        "The layer has no residual addition of the asked part (attention or mlp).",
        "Skip the whole layer, or look at fxopt.report().summary() for the parts that were found.",
    ),
    Reason(
        "FX114",
        "no residual path",
        "Nothing is added to the input of these modules, so their output cannot be replaced by their input.",
        "Only layers with a residual connection can be skipped.",
    ),
    # FX2xx: the structure fits, the meaning is not proven to.
    Reason(
        "FX201",
        "dtype not handled",
        "The rewrite has no form for this data type.",
        "The message names the types it has.",
    ),
    Reason("FX202", "layout not handled", "Strides or memory layout do not fit.", "Make the tensor contiguous."),
    Reason(
        "FX203",
        "mask unknown",
        "What the mask hides could not be proven.",
        "Pass Hugging Face's own masks, or none; the message says what was inferred.",
    ),
    Reason(
        "FX204",
        "dynamic dimension",
        "A symbolic size stands where the rewrite needs a number.",
        "Use a static cache, or dynamic=False.",
    ),
    Reason(
        "FX205",
        "training",
        "The graph computes gradients or applies dropout; this rewrite is for inference.",
        "Call model.eval() and run under torch.no_grad().",
    ),
    Reason(
        "FX206",
        "alias not proven",
        "Two tensors may share memory and one of them is written.",
        "Copy one of them before the call.",
    ),
    Reason(
        "FX207",
        "device not handled",
        "The rewrite does not pay or does not exist on this device.",
        "Nothing to do: the graph runs as Inductor compiles it.",
    ),
    Reason(
        "FX208",
        "cache not understood",
        "The KV cache of this layer is not written in a way the policy can keep right.",
        "Use StaticCache or DynamicCache.",
    ),
    Reason(
        "FX209",
        "tokens are mixed",
        "The block combines each token with its neighbours, which has no meaning for tokens picked out of a sequence.",
        "Route other layers (layers=...), or a part without it (part='mlp').",
    ),
    # FX3xx: legal, and predicted not to pay.
    Reason("FX301", "predicted slower", "The cost model expects no gain.", "The message gives the estimate."),
    Reason("FX302", "shape too small", "The work is too small to repay the overhead.", "Nothing to do."),
    Reason("FX303", "no kernel here", "No generated kernel for this architecture.", "Nothing to do: the library runs."),
    # FX4xx: resources.
    Reason("FX401", "shared memory", "A kernel would need more shared memory than the device has.", "Nothing to do."),
    Reason("FX402", "registers", "A kernel would spill registers.", "Nothing to do."),
    # FX5xx: what the user asked for.
    Reason("FX501", "disabled", "The technique was switched off.", "Remove it from disable=(...)."),
    Reason("FX502", "settings conflict", "Two settings cannot hold together.", "The message names both places."),
    Reason(
        "FX503",
        "not in this phase",
        "The setting acts in another phase (prompt or decode) than this graph.",
        "Expected for phase='decode' on prompts; nothing to do.",
    ),
    Reason(
        "FX504",
        "outside the setting's modules",
        "The setting was given for other modules than these.",
        "Decorate the module that holds the layers, or use a path mapping.",
    ),
    Reason(
        "FX505",
        "index beyond this graph",
        "An index of the setting names a layer that is not in this graph.",
        "A graph break may hold the other layers; see TORCH_LOGS=graph_breaks.",
    ),
    Reason(
        "FX506",
        "needs the whole model",
        "The setting names modules of a model or files by their paths, and a graph alone does not hold them.",
        "Hand the whole model and the technique to fxopt.compile(model, technique).",
    ),
    # FX6xx: the environment and the road to the backend.
    Reason(
        "FX601",
        "generate not compiled",
        "generate() runs the original model, not the compiled wrapper.",
        "Write fxopt.compile(model) or model.compile(backend='fxopt').",
    ),
    Reason(
        "FX602",
        "annotation lost",
        "A graph break inside a decorated module removed its annotation; the setting "
        "was found through the module itself and will not recompile when changed.",
        "Remove the graph break (TORCH_LOGS=graph_breaks).",
    ),
    Reason(
        "FX603",
        "cache bypassed",
        "A compile cache of torch is bypassed by an operation of this graph.",
        "The message names the operation; compilation is repeated in each process.",
    ),
    Reason(
        "FX604",
        "host synchronisation",
        "The step reads a value on the host to choose its branch.",
        "The message says why it is worth it.",
    ),
    # FX9xx: something went wrong inside fxopt; the model runs untouched.
    Reason(
        "FX901",
        "pass failed",
        "The pass raised an error; the graph was restored to what it was before.",
        "Run with strict=True for the traceback and report it; disable=('<pass>',) silences it.",
    ),
    Reason(
        "FX902",
        "graph did not verify",
        "The pass left a graph that does not hold together; it was restored.",
        "Run with strict=True for the traceback and report it; disable=('<pass>',) silences it.",
    ),
)

REASONS: dict[str, Reason] = {reason.code: reason for reason in _ALL}


def explain(code: str) -> Reason:
    """The reason with that code; raises KeyError that lists the nearest families."""
    try:
        return REASONS[code.upper()]
    except KeyError:
        known = ", ".join(REASONS)
        raise KeyError(f"There is no reason code {code!r}. Known codes: {known}") from None
