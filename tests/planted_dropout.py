"""Planted errors in dropout masks: (what, test, changes) of each."""

from __future__ import annotations

MASKS = "models/test_prefix_dropout.py::"
EQUAL = MASKS + "test_equal_prefixes_have_one_mask_and_everything_else_has_its_own"

PLANTED = [
    (
        "a dropout mask hangs on the token alone, not on its prefix",
        EQUAL,
        (
            (
                "batches/token_keys.py",
                "token_keys",
                "np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * powers)",
                "(tokens.astype(np.uint64) + np.uint64(1)) * powers",
            ),
        ),
    ),
    (
        "all layers have one dropout mask",
        EQUAL,
        (("models/prefix_dropout.py", "use_prefix_dropout", "name.encode()", "b''"),),
    ),
    (
        "two columns share the bits of their dropout mask",
        MASKS + "test_masks_of_tokens_columns_and_layers_are_not_correlated",
        (
            (
                "models/prefix_dropout.py",
                "dropped_values",
                ".view(torch.int16)",
                ".view(torch.int16)[..., 0::2].repeat_interleave(2, -1)",
            ),
        ),
    ),
    (
        "values that are kept are not scaled",
        MASKS + "test_the_share_that_is_dropped_and_the_scale",
        (("models/prefix_dropout.py", "PrefixDropout.forward", " / (1.0 - steps / STEPS_OF_16_BITS)", ""),),
    ),
    (
        "a layer that is computed again gets the keys of the forward that began last",
        MASKS + "test_a_layer_that_is_computed_again_has_its_mask_again_though_another_forward_began[False]",
        (
            (
                "models/prefix_dropout.py",
                "ForwardKeys.current",
                "self._keys.get(seed)",
                "next(reversed(self._keys.values()), None)",
            ),
        ),
    ),
    (
        "a dropout layer that is used twice has one mask",
        MASKS + "test_a_layer_that_is_used_twice_has_two_masks_and_the_same_two_again",
        (("models/prefix_dropout.py", "PrefixDropout.forward", "self.calls += 1", "pass"),),
    ),
    (
        "every step has the same dropout masks",
        "training/test_dropout_masks.py::"
        "test_keys_hang_on_seed_step_and_prefix_and_not_on_rank_or_micro_batch",
        (
            (
                "training/step.py",
                "StepRunner._forward",
                "step_entropy(self.config.train.seed, step)",
                "step_entropy(self.config.train.seed, 0)",
            ),
        ),
    ),
    (
        "a sample's keys hang on where its tokens stand in a row",
        "batches/test_tree_training.py::"
        "test_with_dropout_every_packing_gives_the_losses_and_gradients_of_padded_samples[packed]",
        (
            (
                "batches/layout.py",
                "_keys",
                "token_keys(row, entropy)",
                "token_keys(row, entropy + int(path[0]))",
            ),
        ),
    ),
]
