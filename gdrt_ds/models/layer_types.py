"""The allow-list of layer types: which modules of a model keep the samples of one row apart.

Several samples stand in one row (packing), or many items hang behind one prompt (scoring the
catalogue). Both are right only where no layer moves information between positions, except attention
that follows our layout or mask. transformers' convolutions, linear attention and recurrent layers
take the layout in their **kwargs and ignore it, so nothing fails and the samples leak into each
other. A list of forbidden layers would miss the next one; this is a list of allowed ones, read from
the modules of the model:

- position-wise: linear layers, embeddings, norms, dropout, activations, MLPs, routers and experts,
  known by their class, or by the ending of the class name that transformers' families share;
- attention: a module whose code hands queries, keys, values and **kwargs to transformers' attention
  interface.

Everything else is named as an obstacle.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass

from torch import nn

from gdrt_ds.models.families import decoder, lm_head

POSITION_WISE = (
    nn.Linear,  # and bitsandbytes' 4-bit layers, which derive from it
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Dropout,
    nn.Identity,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterDict,
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
)
"""Classes of torch that work on each position alone, and containers."""

POSITION_WISE_NAMES = re.compile(
    r"(RMSNorm|RMSNormGated|LayerNorm|MLP|Mlp|RotaryEmbedding|WordEmbedding|Experts|Router|MoeBlock|MoE|Moe"
    r"|DecoderLayer|GPTNeoXLayer|Block|Model|ForCausalLM)$"
)
"""Endings of class names of transformers' families. Blocks and models only call their parts, which
are checked one by one; norms, MLPs, routers and experts work on each position alone."""

UNDERSTOOD_KEYWORDS = frozenset({"dropout", "scaling", "sliding_window", "position_ids"})
"""What the tree attention understands. Others change the result, e.g. attention sinks (`s_aux`) or
capped scores (`softcap`)."""

OWN_MASK = "a mask of its own"
"""Stands among the keywords of an attention layer that makes its mask itself."""


@dataclass(frozen=True)
class LayerTypes:
    """What a model is made of.

    Attributes:
        attention: class name -> keywords that its code hands to the attention interface.
        unlisted: class names that are not on the allow-list, sorted.
    """

    attention: dict[str, frozenset[str]]
    unlisted: tuple[str, ...]

    @property
    def mixing(self) -> str:
        """Why the model cannot keep samples of one row apart, in words; empty if it can."""
        if self.unlisted:
            names = ", ".join(self.unlisted)
            return f"the model has {names}, which may mix the samples of a row"
        if not self.attention:
            return "the model has no attention layer that takes a layout"
        own = sorted(kind for kind, keywords in self.attention.items() if OWN_MASK in keywords)
        return f"{', '.join(own)} makes its attention mask itself" if own else ""

    def not_understood(self, windows: bool) -> str:
        """Why the tree attention cannot stand in for the model's own, in words; empty if it can.

        Args:
            windows: whether the model's config has sliding windows, which the layers must then hand
                on.
        """
        for kind, keywords in sorted(self.attention.items()):
            foreign = sorted(keywords - UNDERSTOOD_KEYWORDS - {OWN_MASK})
            if foreign:
                return f"{kind} computes with {', '.join(foreign)}, which the tree attention does not know"
            if windows and "sliding_window" not in keywords:
                return f"{kind} does not hand its sliding window to the attention"
        return ""


def layer_types(model: nn.Module) -> LayerTypes:
    """Sorts the modules of a causal LM that text passes, with storage or without."""
    attention = {}
    unlisted = set()
    for module in (*decoder(model).modules(), *lm_head(model).modules()):
        if is_position_wise(module):
            continue
        keywords = interface_keywords(type(module))
        if keywords is None:
            unlisted.add(type(module).__name__)
        else:
            attention[type(module).__name__] = keywords
    return LayerTypes(attention, tuple(sorted(unlisted)))


def is_position_wise(module: nn.Module) -> bool:
    """Whether a module itself, its parts apart, keeps positions apart."""
    from transformers.activations import ACT2CLS
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (*POSITION_WISE, Conv1D)):  # GPT-2's Conv1D is a linear layer
        return True
    kind = type(module)
    if kind.__module__.startswith("peft."):  # an adapter around a layer, which is looked at itself
        return True
    activations = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())
    return isinstance(module, activations) or POSITION_WISE_NAMES.search(kind.__name__) is not None


@functools.cache
def interface_keywords(kind: type) -> frozenset[str] | None:
    """Returns the keywords that an attention class hands to transformers' attention interface.

    None if its code does not call the interface, or does not pass its **kwargs, in which the layout
    comes.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return None  # no readable code, nothing is known of it
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and _reads_interface(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    if not calls or not all(any(keyword.arg is None for keyword in call.keywords) for call in calls):
        return None
    keywords = {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
    if not all(_takes_the_mask_as_given(call) for call in calls) or _computes(tree, "attention_mask"):
        return frozenset(keywords | {OWN_MASK})
    return frozenset(keywords - {"attention_mask"})


def _takes_the_mask_as_given(call: ast.Call) -> bool:
    """Whether the mask that goes to the interface is the layer's own argument, unchanged."""
    masks = [keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"]
    masks += call.args[4:5]  # (module, query, key, value, mask)
    return bool(masks) and all(isinstance(mask, ast.Name) and mask.id == "attention_mask" for mask in masks)


def _computes(tree: ast.AST, name: str) -> bool:
    """Whether the code gives a variable a new value that is not just another argument."""
    return any(
        isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))
        and not isinstance(node.value, ast.Name)
        and any(
            isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Store)
            for part in ast.walk(node)
        )
        for node in ast.walk(tree)
    )


def _reads_interface(value: ast.expr) -> bool:
    """Whether an expression looks an attention function up, e.g.
    ALL_ATTENTION_FUNCTIONS.get_interface(...)."""
    return any(
        isinstance(node, ast.Name) and node.id == "ALL_ATTENTION_FUNCTIONS" for node in ast.walk(value)
    )
