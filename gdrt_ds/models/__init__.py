"""The model: where it comes from, how it is loaded and quantised, what its layers allow.

Where it comes from:

    source.py              `model.path` becomes a local folder, config and tokenizer
    built_in.py            models that need no download
    new_tokens.py          tokens added to a model, with their rows
    made_folder.py         a folder that several processes ask for and one makes
    skeleton.py            a model without storage, to look at
    inventory.py           what it is made of, counted on the skeleton
    families.py            what differs between model families
    head_check.py          whether that gives the model's own logits, measured after loading
    fingerprint.py         the fingerprint of a frozen base

How it is loaded:

    load.py                the order of events: settings, attention, weights, adapter
    stock_loading.py       transformers' own way: every rank reads the whole
    sharded_loading.py     straight into ZeRO-3's shards
    weight_files.py        ranges of tensors out of safetensors files
    weight_writer.py       safetensors files, tensor by tensor
    base_values.py         the values that a base computes with, by tensor
    quantization/          one file for each quantization
    four_bit.py            the 4-bit layer that ZeRO-3 can free
    quantised_slices.py    which packed values a rank quantises
    stored_four_bit.py     checkpoints that are 4-bit already
    float32.py             computing in float32, whatever the training's dtype was

What is trained, and beside what:

    adapters.py            the LoRA adapter around the frozen base
    token_rows.py          trained rows of chosen tokens
    prefix_dropout.py      dropout masks that hang on the tokens, not on the layout
    reference_adapters.py  the models that training compares itself with

What its layers allow:

    layer_types.py         which modules keep the samples of a row apart
    packing.py             how samples are put into rows, and why
    scoring_choice.py      whether the catalogue is scored as a tree or item by item
    attention/             one file for each attention
"""
