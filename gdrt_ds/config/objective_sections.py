"""The settings of what is trained for: the groups, how they weigh, and the options of single objectives.

`gdrt_ds.config.sections` puts them into the tree of all settings.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from gdrt_ds.config.base import Section, Weight


class GroupsSection(Section):
    """Which group a target token belongs to."""

    num: int = Field(
        8,
        ge=1,
        le=32767,
        description="Number of groups G. With labels (user_attribute, provider, column, label) these are "
        "the G - 1 most frequent labels and the rest.",
    )
    by: Literal[
        "relevance",
        "item_popularity",
        "user_attribute",
        "provider",
        "position",
        "length",
        "column",
        "label",
        "random",
    ] = Field(
        "relevance",
        description="What decides the group. `relevance` is the method's: how well the prompt without the "
        "history predicts the token. `length` is the number of the target's tokens. `label` is the field "
        "`group` of rows (`data.format=sft`). `random` has the same sizes and no meaning (a control).",
    )
    binning: Literal["quantile", "uniform"] = Field(
        "quantile",
        description="How relevance, popularity or length is cut into groups: equal shares, or equal widths.",
    )
    reference: Literal["base", "auxiliary_sft", "live", "corpus"] = Field(
        "base",
        description="What scores the prompt without the history. `base`: the untuned model. "
        "`auxiliary_sft`: an adapter trained without histories. `live`: the model in training. `corpus`: "
        "counts of the next title token in train, no model.",
    )
    reference_adapter: str | None = Field(
        None, description="PEFT folder for `groups.reference=auxiliary_sft`, which needs it."
    )
    refresh_every: int = Field(
        200, ge=1, description="Steps between two scorings with `groups.reference=live`."
    )
    column: str | None = Field(
        None,
        description="Label for `groups.by=column` (any column of rows) or `groups.by=user_attribute`, e.g. "
        "`gender`; both need it.",
    )


COUNTED = ("relevance", "markov")
"""Values of `dro.excess` that name no adapter and hang on no history that changes from epoch to epoch."""


class DroSection(Section):
    """How group losses become group weights q."""

    tau: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,  # NaN is not above 0
        examples=[0.3],
        description="Temperature in nats. Large values approach plain SFT, small ones the worst group "
        "alone; infinity (`dro.tau=.inf`) is the plain mean over the prior. Example: `dro.tau=0.3`.",
    )
    estimate: Literal["batch", "ema"] = Field(
        "batch",
        description="Where the weights' group losses come from: `batch` is this global batch (exact "
        "gradient), `ema` are moving averages of the steps before (group_dro: the weights of the step "
        "before).",
    )
    prior: Literal["token_share", "uniform"] = Field(
        "token_share",
        description="Prior p over the groups that the batch holds: their shares of the tokens, or equal "
        "parts.",
    )
    ema_rate: float = Field(
        0.1, gt=0, le=1, description="Rate b of the moving averages, L <- (1 - b) L + b L_batch."
    )
    excess: bool | str = Field(
        False,
        description="Weighs groups by their loss above a reference's loss. `relevance`: the loss of the "
        "prompt alone under `groups.reference`, so that the group that gains least from its histories "
        "weighs most. `markov`: the loss of counting which item follows which, so that the group that is "
        "furthest behind what can be learned weighs most. With the history, as DoReMi does: `true` takes "
        "the base; a PEFT or run folder takes that adapter.",
    )
    eta: float = Field(
        0.1, gt=0, le=1_000_000, description="Objective group_dro: step size of the exponentiated gradient."
    )
    alpha: float = Field(0.5, gt=0, le=1, description="Objective cvar: the worst share that is averaged.")
    cvar_over: Literal["tokens", "groups"] = Field(
        "tokens", description="Objective cvar: whether the worst share is one of tokens or of groups."
    )
    worst_weight: float = Field(
        0.5,
        ge=0,
        le=1000,
        description="Objective sft_go: lambda, the weight of the worst group's loss beside the mean loss. "
        "0 is plain SFT. The default is ours.",
    )
    frozen_weights: list[Weight] | str | None = Field(
        None,
        examples=[[0.25, 0.75]],
        description="Control: constant group weights, as a list of G numbers or as the run folder whose "
        "last weights are taken. They are scaled to sum to 1; a group of weight 0 is not trained on. "
        "Empty: weights adapt.",
    )

    @property
    def excess_adapter(self) -> str | None:
        """The folder of the adapter whose losses `excess` subtracts, if it names one."""
        return self.excess if isinstance(self.excess, str) and self.excess not in COUNTED else None

    @field_validator("frozen_weights")
    @classmethod
    def _some_weight_is_left(cls, weights: list[float] | str | None) -> list[float] | str | None:
        if isinstance(weights, list) and not sum(weights) > 0:
            raise ValueError("no weight is above 0, so no group would be trained on")
        return weights


class ObjectiveOptions(Section):
    """Numbers that single objectives need."""

    focal_gamma: float = Field(2.0, ge=0, le=1000, description="Objective focal: gamma of (1 - p)^gamma l.")
    msl_temperature: float = Field(
        1.0,
        ge=1e-3,
        le=1000,
        description="Objectives msl, gdrt+msl and bear: temperature of the masked softmax.",
    )
    cft_alpha: float = Field(
        0.1, ge=0, le=1000, description="Objective cft: weight of the counterfactual term."
    )
    cft_beta: float = Field(
        0.5,
        ge=0,
        le=1000,
        description="Objective cft: weight at the last target token; weights change linearly to it from 1.",
    )
    igd_beta: float = Field(
        0.1,
        ge=0,
        le=1000,
        description="Objective igd: weight of tokens that the titles' prefix tree already determines.",
    )
    reweight_power: float = Field(
        1.0,
        ge=0,
        le=10,
        description="Objective reweight: a sample weighs its target's number of train interactions to the "
        "power of minus this.",
    )
    bear_lambda: float = Field(
        0.25,
        ge=0,
        le=1000,
        description="Objective bear: lambda of the token weights 1 + lambda sigmoid(m / xi), where m is the "
        "target's log-probability minus the K-th largest. 0 is the masked softmax without weights. The "
        "default is the authors' for Amazon Toys.",
    )
    bear_xi: float = Field(
        2.75,
        ge=1e-3,
        le=1000,
        description="Objective bear: temperature xi of the weights, in nats. The default is the authors' for "
        "Amazon Toys.",
    )
    bear_k: int = Field(
        10, ge=1, le=1000, description="Objective bear: K, the number of beams of the search that is meant."
    )
    bear_favours: Literal["kept", "at_risk"] = Field(
        "kept",
        description="Objective bear: which tokens weigh more. `kept`: those above the K-th, as in the "
        "authors' code; `at_risk`: those below it, which a beam search would drop.",
    )
