"""The planted errors of `make test-mutations`, and the test that each of them must make fail."""

from __future__ import annotations

from dataclasses import dataclass

from tests.planted_cuda import PLANTED as PLANTED_CUDA
from tests.planted_dropout import PLANTED as PLANTED_DROPOUT
from tests.planted_packing import PLANTED as PLANTED_PACKING
from tests.planted_rows import PLANTED as PLANTED_ROWS
from tests.planted_sasrec import PLANTED as PLANTED_SASREC
from tests.planted_windows import PLANTED as PLANTED_WINDOWS


@dataclass(frozen=True)
class Mutation:
    """What is planted and which test must fail.

    Attributes:
        test: a function of test_named_errors.py, or `file.py::function` for a unit test.
        changes: (file in gdrt_ds or eval/..., function, old text, new text), see planting_source.py.
    """

    what: str
    test: str
    changes: tuple[tuple[str, str, str, str], ...]


MUTATIONS = [
    Mutation(
        "1 mean over ranks of local group means",
        "test_error_01_group_loss_is_sum_over_count_not_mean_of_local_means",
        (
            (
                "dro/buffer.py",
                "StepBuffer.add",
                "+= torch.nan_to_num(sums, 0.0, 0.0, 0.0)",
                "+= torch.nan_to_num(sums / counts.to(sums), 0.0, 0.0, 0.0)",
            ),
            (
                "dro/buffer.py",
                "StepBuffer.losses",
                "return self.loss_sums / torch.where(self.present, self.counts, 1.0)",
                "return self.loss_sums / dist.get_world_size()",
            ),
        ),
    ),
    Mutation(
        "2 weights from a rank's own losses",
        "test_error_02_weights_come_from_all_ranks_and_are_bitwise_equal",
        (("training/step.py", "StepRunner._reduce", "buffer.reduce().wait()", "buffer.wait()"),),
    ),
    Mutation(
        "3 absent group counts as loss 0",
        "test_error_03_absent_group_has_no_weight_and_does_not_count_as_loss_zero",
        (
            (
                "dro/weights.py",
                "prior",
                "else present.double()",
                "else torch.ones_like(counts, dtype=torch.float64)",
            ),
        ),
    ),
    Mutation(
        "3 absent group pulls its moving average to 0",
        "test_error_03_absent_group_has_no_weight_and_does_not_count_as_loss_zero",
        (
            (
                "dro/state.py",
                "DroState.update_ema",
                "self.ema_weight = torch.where(present, (1 - rate) * self.ema_weight + rate, "
                "self.ema_weight)",
                "self.ema_weight = (1 - rate) * self.ema_weight + rate",
            ),
        ),
    ),
    Mutation(
        "4 q moves per micro-batch",
        "test_error_04_weights_move_once_per_optimizer_step_not_per_micro_batch",
        (
            (
                "training/step.py",
                "StepRunner._two_pass_order",
                "            self._measure(found, buffer, facts.slots[index] if self.per_token else None)\n",
                "            self._measure(found, buffer, facts.slots[index] if self.per_token else None)\n"
                "            if index < len(facts.micro_steps) - 1:\n"
                "                self._remember(buffer.losses, buffer.counts)\n",
            ),
        ),
    ),
    Mutation(
        "5 only rank 0 remembers: stale q elsewhere",
        "test_error_05_every_rank_remembers_so_no_rank_has_stale_weights",
        (
            (
                "training/step.py",
                "StepRunner.run",
                "        if taken:\n",
                "        if taken and self.runtime.is_main:\n",
            ),
        ),
    ),
    Mutation(
        "6 mean of micro-batch means",
        "test_error_06_accumulation_divides_by_the_count_of_the_step_not_of_micro_batches",
        (
            (
                "training/step.py",
                "StepRunner._early_order",
                "self._backward(found.sums, found.values, coefficients, None)",
                "self._backward(found.sums, found.values, q / (group_sums(self._weights_of(found), "
                "found.groups, self.tokens.num_groups).clamp_min(1) * len(facts.micro_steps) "
                "* self.runtime.world), None)",
            ),
        ),
    ),
    Mutation(
        "7 losses weighted in place before they are reported",
        "test_error_07_reported_losses_are_the_unweighted_ones",
        (
            (
                "training/step.py",
                "StepRunner._early_order",
                "            self._measure(found, buffer)\n            self._backward(",
                "            found.sums.data.mul_(q * self.tokens.num_groups)\n"
                "            self._measure(found, buffer)\n            self._backward(",
            ),
        ),
    ),
    Mutation(
        "8 exp without subtracting the maximum",
        "test_error_08_small_tau_gives_the_worst_group_without_overflow",
        (
            ("dro/weights.py", "closed_form_weights", "(kept - worst) / tau", "kept / tau"),
            (
                "dro/weights.py",
                "closed_form_weights",
                "q = torch.softmax(p.clamp_min(1e-300).log() + below, 0)",
                "q = p * below.exp() / (p * below.exp()).sum()",
            ),
        ),
    ),
    Mutation(
        "9 local instead of global rank 0",
        "test_error_09_only_global_rank_zero_writes_when_two_machines_have_a_local_rank_zero",
        (("runtime/ranks.py", "Runtime.is_main", "return self.rank == 0", "return self.local_rank == 0"),),
    ),
    Mutation(
        "10 padding counted in a group",
        "test_error_10_padding_belongs_to_no_group",
        (
            (
                "batches/layout.py",
                "_padded",
                "np.arange(b * width, b * width + len(row))",
                "np.arange(b * width, (b + 1) * width)",
            ),
        ),
    ),
    Mutation(
        "11 moving averages are not restored",
        "test_error_11_weights_and_moving_averages_come_back_from_the_checkpoint",
        (
            (
                "dro/state.py",
                "DroState.load_state_dict",
                'for name in ("ema", "ema_weight", "q"):',
                'for name in ("q",):',
            ),
        ),
    ),
    Mutation(
        "11 online q is not restored",
        "test_error_11_weights_and_moving_averages_come_back_from_the_checkpoint",
        (
            (
                "dro/state.py",
                "DroState.load_state_dict",
                'for name in ("ema", "ema_weight", "q"):',
                'for name in ("ema", "ema_weight"):',
            ),
        ),
    ),
    Mutation(
        "11 the trainer leaves the state out",
        "test_error_11_weights_and_moving_averages_come_back_from_the_checkpoint",
        (
            (
                "training/resuming.py",
                "client_state",
                '"dro": state.state_dict(),',
                '"dro": DroState(grouped.plan.num).state_dict(),',
            ),
        ),
    ),
    Mutation(
        "prior ignored in the closed form",
        "dro/test_dro.py::test_closed_form_is_the_maximiser_that_scipy_finds",
        (
            (
                "dro/weights.py",
                "closed_form_weights",
                "q = torch.softmax(p.clamp_min(1e-300).log() + below, 0)",
                "q = torch.softmax(below, 0)",
            ),
        ),
    ),
    Mutation(
        "objective by log instead of log1p",
        "dro/test_dro.py::test_infinite_tau_with_token_shares_is_sft",
        (
            (
                "dro/weights.py",
                "closed_form_weights",
                "(p * below.expm1()).sum().log1p()",
                "(p * below.exp()).sum().log()",
            ),
        ),
    ),
    Mutation(
        "moving average without bias correction",
        "dro/test_dro.py::test_moving_average_is_bias_corrected_and_an_absent_group_keeps_its_own",
        (
            (
                "dro/state.py",
                "DroState.ema_losses",
                "self.ema / self.ema_weight.clamp_min(1e-300)",
                "self.ema",
            ),
        ),
    ),
    Mutation(
        "CVaR takes the best share",
        "dro/test_dro.py::test_cvar_is_the_linear_programme_and_its_limits_are_mean_and_maximum",
        (
            (
                "dro/weights.py",
                "cvar_weights",
                "-torch.inf), descending=True, stable=True)",
                "torch.inf), descending=False, stable=True)",
            ),
        ),
    ),
    Mutation(
        "NaN is not flagged",
        "dro/test_dro.py::test_buffer_adds_micro_batches_reports_nonfinite_and_stop_and_keeps_token_slots",
        (
            (
                "dro/buffer.py",
                "StepBuffer.add",
                "(~torch.isfinite(sums)).any().to(self.data)",
                "torch.isnan(sums).all().to(self.data)",
            ),
        ),
    ),
    Mutation(
        "batches depend on the number of ranks",
        "batches/test_batches.py::test_the_global_batch_does_not_depend_on_ranks_accumulation_or_packing",
        (
            (
                "batches/plan.py",
                "BatchPlan.order",
                "permutation(self.seed, epoch, self.count)",
                "permutation(self.seed + self.world, epoch, self.count)",
            ),
        ),
    ),
    Mutation(
        "label off by one",
        "batches/test_batches.py::test_supervised_positions_see_the_token_before_their_label",
        (
            (
                "batches/layout.py",
                "build_micro_batch",
                "supervised = [path[len(path) - n :]",
                "supervised = [path[len(path) - n - 1 : -1]",
            ),
        ),
    ),
    Mutation(
        "first title token predicted from another title",
        "dro/test_relevance.py::test_entry_scores_are_read_at_the_token_before_however_titles_are_dealt_out",
        (
            (
                "batches/layout.py",
                "_packed",
                "np.arange(stop - body, stop)",
                "np.arange(stop - body - 1, stop - 1)",
            ),
        ),
    ),
    Mutation(
        "only the first block of a bfloat16 head is multiplied",
        "loss/test_group_loss.py::test_a_bfloat16_head_of_several_blocks_is_no_worse_than_plain",
        (
            (
                "loss/head.py",
                "Head._backproject_in_blocks",
                "range(0, gradient_CV.shape[1], CPU_NARROW_BLOCK)",
                "range(0, min(gradient_CV.shape[1], CPU_NARROW_BLOCK), CPU_NARROW_BLOCK)",
            ),
        ),
    ),
    Mutation(
        "samples of a packed row see each other",
        "batches/test_tree_attention.py::test_packed_rows_give_the_padded_hidden_states_and_gradients[llama]",
        (
            (
                "batches/tree_attention.py",
                "_segments",
                "values[number]], dim=2)",
                "values[number]], dim=2) + values[-1][:, :, -1:] * 0.01",
            ),
        ),
    ),
    Mutation(
        "window forgotten in packed rows",
        "batches/test_tree_attention.py::"
        "test_packed_rows_give_the_padded_hidden_states_and_gradients[mistral]",
        (
            (
                "batches/tree_attention.py",
                "_chain_mask",
                "return mask & (query - key < window)",
                "return mask",
            ),
        ),
    ),
    Mutation(
        "a chain sees the end of its parent instead of the way to itself",
        "batches/test_tree_attention.py::"
        "test_merged_prefixes_give_the_padded_hidden_states_and_gradients[llama-0]",
        (
            (
                "batches/tree_attention.py",
                "_start",
                "way.narrow(2, 0, depth)",
                "way.narrow(2, way.shape[2] - depth, depth)",
            ),
        ),
    ),
    Mutation(
        "a subtree ends one token late",
        "batches/test_prefix_tree.py::test_small_trees",
        (
            (
                "batches/prefix_tree.py",
                "_Builder.add",
                "ends[leave - depth : below - depth] = self.total",
                "ends[leave - depth : below - depth] = self.total + 1",
            ),
        ),
    ),
    Mutation(
        "layers that mix samples are let into packed rows",
        "models/test_families.py::test_the_layers_decide_about_packing_and_one_line_says_why[lfm2]",
        (("models/packing.py", "packing_obstacle", "if layers.mixing:", "if False:"),),
    ),
    Mutation(
        "the probe of packed rows calls every leak small",
        "training/test_leak_check.py::test_a_leak_that_the_choice_had_missed_is_measured[lfm2]",
        (("training/leak_check.py", "Leak.found", "self.before > max(", "self.before > 1e9 + max("),),
    ),
    Mutation(
        "sequences are read without the tokens before them",
        "inference/test_path_reader.py::"
        "test_every_family_is_scored_as_its_layers_allow_and_equals_plain_forward_passes[lfm2]",
        (
            (
                "inference/path_reader.py",
                "_sequences",
                "tuple(tokens[row, seen].tolist())",
                "tuple(tokens[row, seen].tolist()[-9:])",
            ),
        ),
    ),
    Mutation(
        "mask ignores the end of a subtree",
        "batches/test_tree_attention.py::test_tree_mask_is_ancestor_or_self_and_nothing_else",
        (
            (
                "batches/tree_attention.py",
                "tree_mask",
                "(index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])",
                "(index[None, :] <= index[:, None]) & (index[:, None] <= end[None, :])",
            ),
        ),
    ),
    Mutation(
        "focal weighs by the probability",
        "objectives/test_objectives.py::test_focal_weighs_by_one_minus_probability_and_gamma_zero_is_sft",
        (("objectives/focal.py", "focal_term", "(-(-view.losses).expm1())", "((-view.losses).exp())"),),
    ),
    Mutation(
        "reweight by popularity",
        "objectives/test_objectives.py::test_reweight_is_inverse_popularity_and_power_zero_is_sft",
        (("objectives/reweight.py", "inverse_popularity", "** -table", "** table"),),
    ),
    Mutation(
        "bear takes the other sign",
        "objectives/test_objectives.py::"
        "test_bear_favours_tokens_that_the_beam_keeps_unless_it_is_told_otherwise",
        (
            (
                "objectives/bear.py",
                "beam_weights",
                "margin = -view.losses.detach().double() - view.top_k_log_probs.double()",
                "margin = view.losses.detach().double() + view.top_k_log_probs.double()",
            ),
        ),
    ),
    Mutation(
        "the K largest logits of earlier blocks are forgotten",
        "loss/test_group_loss.py::"
        "test_the_kth_log_probability_without_gradients_runs_over_blocks_of_the_vocabulary",
        (("loss/top_k.py", "RunningTopK.extend", "if self.best_CK is not None:", "if False:"),),
    ),
    Mutation(
        "sft_go takes an absent group for the worst",
        "objectives/test_objectives.py::test_an_absent_group_is_never_the_worst_of_sft_go",
        (
            (
                "objectives/sft_go.py",
                "mean_and_worst",
                "torch.where(view.present, view.losses, -torch.inf).argmax()",
                "view.losses.argmax()",
            ),
        ),
    ),
    Mutation(
        "sft_go leaves the mean out",
        "objectives/test_objectives.py::"
        "test_sft_go_is_the_mean_plus_lambda_times_the_worst_group_and_lambda_zero_is_sft",
        (
            (
                "objectives/sft_go.py",
                "mean_and_worst",
                "q = q + torch.where(",
                "q = torch.where(",
            ),
        ),
    ),
    Mutation(
        "random groups keep their order",
        "dro/test_groups.py::test_random_groups_have_the_sizes_of_relevance_groups_and_no_meaning",
        (("dro/groups.py", "apply_groups", 'if plan.by == "random":', 'if plan.by == "shuffled":'),),
    ),
    Mutation(
        "unknown keys are accepted",
        "test_config.py::test_an_unknown_key_is_an_error_with_the_nearest_name",
        (("config/base.py", "Section", 'extra="forbid"', 'extra="ignore"'),),
    ),
    Mutation(
        "a preset stands before the user's file",
        "packaging/test_invocation.py::"
        "test_the_users_own_file_stands_before_a_preset_and_presets_are_found_from_anywhere",
        (("files.py", "preset_path", "if own.is_file() or own.is_absolute():", "if own.is_absolute():"),),
    ),
    Mutation(
        "the working folder stays in front",
        "packaging/test_invocation.py::"
        "test_a_working_folder_that_pythonpath_names_stands_behind_our_packages",
        (("invocation.py", "put_own_packages_first", "!= here]", "!= '']"),),
    ),
    Mutation(
        "a missing package is no reason not to start",
        "packaging/test_doctor.py::test_packages_are_judged_by_whether_every_run_needs_them",
        (
            (
                "planning/diagnosis.py",
                "_about_packages",
                'Finding(True, f"{name} is not installed", wish)',
                'Finding(False, f"{name} is not installed", wish)',
            ),
        ),
    ),
]
PLANTED_ELSEWHERE = (
    *PLANTED_CUDA,
    *PLANTED_DROPOUT,
    *PLANTED_PACKING,
    *PLANTED_ROWS,
    *PLANTED_SASREC,
    *PLANTED_WINDOWS,
)
MUTATIONS += [Mutation(*planted) for planted in PLANTED_ELSEWHERE]
