"""What is done with a trained run: exact scores, lists, exports.

Scores and lists:

    recommender.py        opens a run: model, prompt, catalogue and trie that belong together
    row_model.py          the same for a run on rows of prompt and completion
    prompt_reader.py      prompts are read once, token trees hang behind them
    path_reader.py        the same answers for models whose layers follow no mask
    catalogue_scoring.py  exact scores of the whole catalogue
    recommending.py       histories in, ranked titles out
    constrained.py        generation that answers with titles only
    vllm_processor.py     the same in vLLM
    sglang_processor.py   the same in SGLang

Exports:

    exporting.py          the adapter merged into its base, as a folder
    merging.py            the way by tensor
    export_in_memory.py   the way in memory
    export_checks.py      the written model gives the logits of base + adapter
    layer_by_layer.py     those logits, for a model larger than memory
    output_folder.py      the folder that an export writes
    catalogue_files.py    catalogue, trie and prompt beside the model
    publishing.py         an adapter as others can use it, and its way to the hub
    model_card.py         the README of an exported model
    adapter_card.py       the README of a published adapter
    public_names.py       what it says in place of paths
"""
