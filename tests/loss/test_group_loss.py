"""The fused group loss against float64, against plain cross-entropy in the same dtype, and its promises about
memory and ZeRO-3.
"""

import gc
import itertools
import weakref

import pytest
import torch
import torch.utils.checkpoint

from gdrt_ds.errors import UserError
from gdrt_ds.loss import AllowedTokens, GroupLoss, describe, group_cross_entropy
from gdrt_ds.loss.head import CPU_BLOCK_BYTES, product_dtype
from tests.loss.cases import (
    Case,
    check_exact,
    check_gradients_add_up,
    check_no_worse_than_plain,
    check_sums_are_sums_of_token_losses,
    check_top_k,
    distance,
)

SETTINGS = {
    "plain": {},
    "trained": {"train": True},
    "bias, frozen head": {"bias": True},
    "bias, trained": {"bias": True, "train": True},
    "scale and temperature": {"logit_scale": 0.3, "temperature": 1.7},
    "soft-cap": {"softcap": 2.0, "logit_scale": 1.3},
    "soft-cap, trained": {"softcap": 2.0, "temperature": 0.6, "train": True},
    "lora": {"lora": True},
    "everything trained": {
        "lora": True,
        "train": True,
        "bias": True,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "temperature": 1.3,
    },
    "allowed": {"allowed": True},
    "allowed, soft-cap": {"allowed": True, "softcap": 2.0, "temperature": 0.7, "bias": True},
    "allowed, everything trained": {
        "allowed": True,
        "lora": True,
        "train": True,
        "bias": True,
        "temperature": 0.5,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_exact_in_float64_whatever_the_chunks(name):
    for chunk_bytes in (None, 3000):
        check_exact(
            lambda *a, chunk_bytes=chunk_bytes, **k: group_cross_entropy(*a, chunk_bytes=chunk_bytes, **k),
            **SETTINGS[name],
        )


@pytest.fixture(params=["native", "converted"])
def bfloat16_products(request, monkeypatch):
    """bfloat16 heads as on a CPU that is fast in bfloat16, and as on one that is not.

    Which of the two this machine is must not decide what is tested.
    """
    native = request.param == "native"
    monkeypatch.setattr("gdrt_ds.loss.head.bfloat16_products", lambda: (native, request.param))
    product_dtype.cache_clear()
    yield
    product_dtype.cache_clear()


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_never_worse_than_plain_cross_entropy(name, dtype):
    check_no_worse_than_plain(
        lambda *a, **k: group_cross_entropy(*a, chunk_bytes=20_000, **k), dtype, n=64, h=32, **SETTINGS[name]
    )


@pytest.mark.parametrize("n", [0, 1, 2, 257, 3000])
def test_any_number_of_tokens(n):
    for train, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        check_no_worse_than_plain(
            lambda *a, **k: group_cross_entropy(*a, chunk_bytes=200_000, **k), dtype, n=n, v=331, train=train
        )


def test_streaming_over_many_row_blocks_accumulates_the_gradient_of_the_head():
    check_exact(
        lambda *a, **k: group_cross_entropy(*a, chunk_bytes=100_000, **k),
        n=4500,
        v=67,
        h=4,
        train=True,
        bias=True,
        lora=True,
    )


@pytest.mark.parametrize("v", [1, 2, 255, 257, 4099])
def test_any_vocabulary_size(v):
    for train in (False, True):
        check_no_worse_than_plain(
            lambda *a, **k: group_cross_entropy(*a, chunk_bytes=50_000, **k), torch.float32, v=v, train=train
        )


@pytest.mark.usefixtures("bfloat16_products")
def test_a_bfloat16_head_of_several_blocks_is_no_worse_than_plain():
    """On CPUs the back-projection sums blocks of 8,192 tokens."""
    for v in (8_192, 8_193, 20_001):
        check_no_worse_than_plain(
            group_cross_entropy, torch.bfloat16, v=v, softcap=2.0 if v == 8_193 else None
        )


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("train", [False, True])
def test_extreme_logits_of_ten_thousand_stay_finite_and_exact(train):
    for dtype in (torch.float32, torch.bfloat16):
        check_no_worse_than_plain(group_cross_entropy, dtype, size=1e4, train=train)
    assert Case(size=1e4).call(group_cross_entropy).token_losses.max() > 1e4


def test_a_head_bias_of_minus_infinity_bans_tokens():
    for train, chunk_bytes in itertools.product((False, True), (None, 3000)):
        case = Case(v=200, bias=True, train=train)
        with torch.no_grad():
            case.settings["bias"][:128] = -torch.inf
        case.labels = case.labels % 72 + 128
        out = case.run(group_cross_entropy, chunk_bytes=chunk_bytes)
        part = Case(v=200, train=train)
        part.labels, part.settings["bias"] = case.labels - 128, case.settings["bias"][128:].detach()
        part.weight, part.hidden = case.weight[128:].detach(), case.hidden
        part.groups, part.d_sums, part.d_tokens = case.groups, case.d_sums, case.d_tokens
        assert all(torch.isfinite(t).all() for t in out)
        assert distance(out[2], part.run(group_cross_entropy)[2]) < 1e-6


def test_gradcheck_of_both_outputs():
    everything = {"train": True, "bias": True, "lora": True, "softcap": 1.5, "temperature": 0.8}
    for settings in (everything, {"softcap": 1.5}, {"allowed": True, "train": True}):
        case = Case(n=7, v=11, h=4, g=3, dtype=torch.float64, **settings)
        lora = case.settings.get("lora")

        def function(*leaves):
            rest = list(leaves[1:])
            weight = rest.pop(0) if case.weight.requires_grad else case.weight
            more = {"bias": rest.pop(0)} if case.settings.get("bias") is not None else {}
            more |= {"lora": (rest[0], rest[1], lora[2])} if lora else {}
            return tuple(
                group_cross_entropy(
                    leaves[0], weight, case.labels, case.groups, 3, **{**case.settings, **more}
                )[:2]
            )

        assert torch.autograd.gradcheck(function, case.leaves)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_kth_log_probability_is_that_of_a_full_sort_whatever_the_chunks(name):
    for chunk_bytes, (dtype, tolerance) in itertools.product(
        (None, 3000), ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1))
    ):
        check_top_k(
            lambda *a, chunk_bytes=chunk_bytes, **k: group_cross_entropy(*a, chunk_bytes=chunk_bytes, **k),
            dtype,
            tolerance,
            **SETTINGS[name],
        )


def test_the_kth_log_probability_without_gradients_runs_over_blocks_of_the_vocabulary():
    case = Case(n=300, v=257, dtype=torch.float64, softcap=2.0)
    with torch.no_grad():
        out = case.call(group_cross_entropy, top_k=4, chunk_bytes=20_000)
    wanted = case.call(group_cross_entropy, top_k=4, implementation="reference")
    assert torch.allclose(out.top_k_log_probs, wanted.top_k_log_probs, atol=1e-12)
    assert case.call(group_cross_entropy).top_k_log_probs is None
    with pytest.raises(UserError, match="top_k is 0"):
        case.call(group_cross_entropy, top_k=0)


def test_sums_are_sums_and_absent_groups_are_zero():
    check_sums_are_sums_of_token_losses(group_cross_entropy)


def test_gradients_of_sums_and_of_token_losses_add_up():
    check_gradients_add_up(group_cross_entropy)
    check_gradients_add_up(lambda *a, **k: group_cross_entropy(*a, frozen_weight=False, **k))


def _planted(change):
    """The real op with an error planted in what it hands out."""

    def op(hidden, weight, labels, groups, num_groups, **settings):
        return change(group_cross_entropy, hidden, weight, labels, groups, num_groups, settings)

    return op


def _mean_instead_of_sum(op, h, w, y, g, n, s):
    out = op(h, w, y, g, n, **s)
    return out._replace(loss_sums=out.loss_sums / torch.bincount(g, minlength=n).clamp_min(1))


def _gradient_without_group_weights(op, h, w, y, g, n, s):
    out = op(h, w, y, g, n, **s)
    mixed = out.loss_sums.sum() / n
    return out._replace(loss_sums=out.loss_sums.detach() + mixed - mixed.detach())


def _absent_group_shares_the_last_loss(op, h, w, y, g, n, s):
    out = op(h, w, y, g, n, **s)
    return out._replace(
        loss_sums=torch.where(torch.bincount(g, minlength=n) == 0, out.loss_sums.sum() / n, out.loss_sums)
    )


def _token_gradient_lost(op, h, w, y, g, n, s):
    out = op(h, w, y, g, n, **s)
    return out._replace(token_losses=out.token_losses.detach() + 0 * out.loss_sums.sum())


def _temperature_ignored(op, h, w, y, g, n, s):
    return op(h, w, y, g, n, **{**s, "temperature": 1.0})


def _scale_after_the_cap(op, h, w, y, g, n, s):
    scale = s.get("logit_scale", 1.0)
    return op(h, w, y, g, n, **{**s, "logit_scale": 1.0, "temperature": s.get("temperature", 1.0) / scale})


def _groups_shifted(op, h, w, y, g, n, s):
    return op(h, w, y, (g + 1) % n, n, **s)


MUTATIONS = [
    (_mean_instead_of_sum, check_sums_are_sums_of_token_losses, {}),
    (_absent_group_shares_the_last_loss, check_sums_are_sums_of_token_losses, {}),
    (_groups_shifted, check_sums_are_sums_of_token_losses, {}),
    (_gradient_without_group_weights, check_gradients_add_up, {}),
    (_token_gradient_lost, check_gradients_add_up, {}),
    (_temperature_ignored, check_exact, {"temperature": 1.7}),
    (_scale_after_the_cap, check_exact, {"softcap": 2.0, "logit_scale": 1.3}),
    (_groups_shifted, check_exact, {}),
]


@pytest.mark.parametrize(
    "change, check, settings", MUTATIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_planted_errors_are_found(change, check, settings):
    check(group_cross_entropy, **settings)
    with pytest.raises(AssertionError):
        check(_planted(change), **settings)


def test_two_calls_are_bitwise_equal():
    for settings in ({}, {"train": True, "lora": True, "bias": True}, {"allowed": True}):
        case = Case(n=600, v=499, **settings)
        first, second = (
            case.run(group_cross_entropy, chunk_bytes=80_000),
            case.run(group_cross_entropy, chunk_bytes=80_000),
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_chunk_sizes_change_nothing_but_roundings():
    for settings in ({}, {"train": True, "lora": True}, {"allowed": True}):
        case = Case(n=200, v=499, **settings)
        results = [case.run(group_cross_entropy, chunk_bytes=size) for size in (1, 5_000, 60_000, None)]
        for other in results[1:]:
            assert all(distance(a, b) < 2e-6 for a, b in zip(other, results[0]))


def test_without_grad_the_result_is_the_same_and_no_row_gradient_is_stored():
    case = Case(n=300, v=499)
    with torch.no_grad():
        out = case.call(group_cross_entropy)
    assert (
        not out.loss_sums.requires_grad
        and distance(out.loss_sums, case.call(group_cross_entropy).loss_sums) < 1e-6
    )
    assert _peak_bytes(case, backward=False, grad=False) < 300 * 499 * 4 + 40_000


def test_zero_tokens_stay_attached_to_the_graph():
    for train in (False, True):
        case = Case(n=0, train=train)
        sums, tokens, *gradients = case.run(group_cross_entropy)
        assert sums.tolist() == [0.0] * 5 and tokens.shape == (0,)
        assert all(g.shape == leaf.shape and g.abs().sum() == 0 for g, leaf in zip(gradients, case.leaves))


def _peak_bytes(case, backward=True, grad=True, **more) -> int:
    """The most bytes that torch's allocator handed out at once, beyond the inputs."""
    from torch.profiler import ProfilerActivity, profile

    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.set_grad_enabled(grad),
    ):
        out = case.call(group_cross_entropy, **more)
        if backward:
            out.loss_sums.sum().backward()
    alive = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        alive += event.nbytes()
        peak = max(peak, alive)
    case.hidden.grad = None
    return peak


def _workspace(case) -> int:
    """What a bfloat16 product may take besides: oneDNN's own, or a block of the head in float32."""
    if case.hidden.dtype != torch.bfloat16:
        return 0
    if product_dtype(torch.bfloat16, "cpu")[0] == torch.bfloat16:
        return 2**18
    return min(case.weight.numel() * 4, CPU_BLOCK_BYTES * torch.get_num_threads())


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": torch.bfloat16}, {"softcap": 3.0}, {"dtype": torch.bfloat16, "softcap": 3.0}]
)
@pytest.mark.usefixtures("bfloat16_products")
def test_memory_beyond_the_inputs_is_the_chunk_budget_and_one_row_gradient(settings):
    case = Case(n=2000, v=3001, h=64, **settings)
    few = 2000 * 64  # a handful of numbers per token: losses, normalisers, coefficients
    workspace = _workspace(case)
    budget = 2**20
    allowed = budget + case.hidden.numel() * case.hidden.element_size() + few + workspace
    peak = _peak_bytes(case, chunk_bytes=budget)
    assert allowed / 2 < peak <= allowed


@pytest.mark.usefixtures("bfloat16_products")
def test_a_wide_bfloat16_head_keeps_its_float32_sums_within_the_budget():
    """On CPUs the product with a narrow head is summed in float32, block by block.

    With H a tenth of V these sums count.
    """
    case = Case(n=400, v=10_000, h=1_000, dtype=torch.bfloat16)
    budget = 4 * 2**20
    peak = _peak_bytes(case, chunk_bytes=budget)
    assert budget / 2 < peak - case.hidden.numel() * 2 <= budget + 400 * 64 + _workspace(case)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_budget_takes_512_rows_at_once_on_a_cpu(dtype):
    from gdrt_ds.loss.group_loss import Settings, default_chunk_bytes
    from gdrt_ds.loss.head import Head
    from gdrt_ds.loss.rowwise import TorchRowwise

    vocabulary = 20_000
    head = Head(torch.zeros(vocabulary, 1_024, dtype=dtype), None, None, 1.0, torch.float32)
    settings = Settings(
        1, 1.0, None, 1.0, 1.0, default_chunk_bytes("cpu", vocabulary, dtype.itemsize), "torch", True
    )

    def chunks(rows):
        return len(
            list(TorchRowwise(settings, head.dtype).row_chunks(rows, vocabulary, "cpu", head.scratch_per_row))
        )

    assert chunks(512) == 1 and chunks(3 * 512) >= 2
    assert (
        default_chunk_bytes("cpu", vocabulary, dtype.itemsize, one_pass=False)
        == 32 * 2**20
        == default_chunk_bytes("cuda", vocabulary, 2) // 16
    )


def test_a_kept_graph_can_be_walked_twice():
    case = Case()
    out = case.call(group_cross_entropy)
    first = torch.autograd.grad(out.loss_sums.sum(), case.hidden, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(out.loss_sums.sum(), case.hidden)[0])


def test_the_one_pass_case_keeps_no_alias_of_the_head():
    for settings in ({}, {"dtype": torch.bfloat16}):
        case = Case(**settings)
        alive = weakref.ref(case.weight.untyped_storage())
        out = case.call(group_cross_entropy)
        case.weight = None
        gc.collect()
        assert alive() is None
        out.loss_sums.sum().backward()
        assert case.hidden.grad.abs().sum() > 0


def test_the_trained_case_reads_the_parameter_again_in_the_backward_as_zero3_needs():
    case = Case(train=True)
    expected = case.run(group_cross_entropy)
    case.weight = torch.nn.Parameter(case.weight.detach().clone())
    out = case.call(group_cross_entropy)
    whole = case.weight.data
    case.weight.data = torch.empty(0)  # what ZeRO-3 does when the module's forward has ended
    gc.collect()
    case.weight.data = whole.clone()  # what its hook does before the module's backward
    objective = (out.loss_sums * case.d_sums).sum() + (out.token_losses * case.d_tokens).sum()
    objective.backward()
    assert distance(case.weight.grad, expected[3]) < 1e-6 and distance(case.hidden.grad, expected[2]) < 1e-6


def test_a_weight_that_is_declared_frozen_gets_no_gradient():
    case = Case(train=True)
    case.call(group_cross_entropy, frozen_weight=True).loss_sums.sum().backward()
    assert case.weight.grad is None and case.hidden.grad is not None


def test_hidden_states_of_another_dtype_are_converted_and_get_their_gradient_back():
    case = Case(dtype=torch.bfloat16)
    case.hidden = case.hidden.detach().float().requires_grad_()
    gradient = case.run(group_cross_entropy)[2]
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_does_not_change_the_result(reentrant):
    for settings in ({}, {"train": True, "bias": True}):
        case = Case(**settings)
        expected = case.run(group_cross_entropy)

        def op(hidden, *rest, **more):
            def again(x):
                return tuple(group_cross_entropy(x, *rest, **more))

            return torch.utils.checkpoint.checkpoint(again, hidden, use_reentrant=reentrant)

        objective = sum(
            (value.double() * d).sum() for value, d in zip(case.call(op), (case.d_sums, case.d_tokens))
        )
        objective.backward()
        assert all(torch.equal(leaf.grad, value) for leaf, value in zip(case.leaves, expected[2:]))


def test_autocast_does_not_change_the_result():
    case = Case()
    expected = case.run(group_cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(case.run(group_cross_entropy), expected))


def test_rows_with_one_allowed_token_cost_nothing_and_get_no_gradient():
    case = Case(allowed=True, n=200)
    node = case.settings["allowed"].node
    single = (node == 0) | (node == 5)
    _, losses, gradient = case.run(group_cross_entropy)
    assert single.any() and losses[single].abs().max() == 0 and gradient[single].abs().max() == 0
    assert gradient[~single].abs().amax(1).min() > 0


def _refused(change, *words):
    case = Case()
    with pytest.raises(UserError) as error:
        change(case)
        case.call(group_cross_entropy)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mistakes_are_named():
    _refused(lambda c: c.labels.__setitem__(0, -100), "labels", "-100", "ignore index")
    _refused(lambda c: c.labels.__setitem__(0, 101), "labels", "[0, 101)")
    _refused(lambda c: c.groups.__setitem__(0, 5), "groups", "[0, 5)")
    _refused(lambda c: setattr(c, "labels", c.labels[1:]), "labels", "(36,)", "(37,)")
    _refused(lambda c: setattr(c, "weight", c.weight[:, 1:]), "weight", "ZeRO-3")
    _refused(lambda c: c.settings.update(temperature=0.0), "temperature", "positive")
    _refused(lambda c: c.settings.update(softcap=-1.0), "softcap", "positive")
    _refused(lambda c: c.settings.update(implementation="cuda"), "'cuda'", "triton")
    _refused(lambda c: c.settings.update(bias=torch.zeros(3)), "bias", "(101,)")
    two = AllowedTokens(torch.zeros(37, dtype=torch.long), torch.tensor([0, 2]), torch.tensor([3, 4]))
    _refused(lambda c: (c.settings.update(allowed=two), c.labels.fill_(5)), "not among the allowed tokens")
    empty = AllowedTokens(
        torch.zeros(37, dtype=torch.long), torch.tensor([0, 0]), torch.tensor([], dtype=torch.long)
    )
    _refused(lambda c: c.settings.update(allowed=empty), "allows no token", "leaves")
    beyond = two._replace(tokens=torch.tensor([3, 101]))
    _refused(lambda c: c.settings.update(allowed=beyond), "allowed.tokens", "101")


def test_the_choice_is_described_with_its_reason():
    assert "torch (CPU tensors)" in describe("cpu", torch.float32)
    assert "bfloat16" in describe("cpu", torch.bfloat16)
    assert isinstance(Case().call(group_cross_entropy), GroupLoss)
