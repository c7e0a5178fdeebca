"""Which figures of results.json stand for biases when runs are compared: metrics, and effects of audits."""

METRICS = (
    "mgu@5",
    "dgu@5",
    "mgu_pop5@5",
    "mgu_genres@5",
    "gini@10",
    "coverage@10",
    "entropy@10",
    "aplt@10",
    "popularity_lift@10",
    "logpopdiff@10",
    "rsp@10",
    "reo@10",
    "provider_l1_interactions@10",
    "provider_gini@10",
    "nll_gap_relevance_group",
)


def audit_measure(name: str) -> str:
    """What the headline effect of an audit is called among the measures."""
    return f"audit: {name}"
