"""A run, from its settings to its adapter. run.py is the whole in one screen; begin there.

Its stages, in their order:

    run.py               calls the stages; each returns what it made
    job.py               a started run: its settings, ranks and folder
    preparation.py       settings to tokens
    preflight.py         what can be refused before weights are loaded
    unused.py            settings that were given and that nothing reads
    deepspeed_config.py  the DeepSpeed JSON, every "auto" filled
    loading.py           the model under its engine
    zero3_units.py       what ZeRO-3 gathers at once
    leak_check.py        whether the samples of a packed row see each other
    grouping.py          the group of every target token
    step_inputs.py       the train split as a step needs it
    broken_numbers.py    the error of a run whose numbers are no longer finite
    loop.py              step, validation, checkpoint, until the end
    ending.py            the adapter of the best step, and the summary

A step:

    step.py              micro-batches, one all-reduce, weights, optimizer
    model_with_loss.py   the module that DeepSpeed drives
    losses.py            plain token losses without gradients
    optimizer.py         the optimizer and the learning rate
    validation.py        losses of the validation split by group
    weight_watch.py      one group that takes nearly all the weight

What is kept:

    run_folder.py        who may write into it, and the files in it
    checkpoint.py        published whole or not at all
    engine_state.py      the trainable state, out of the engine and back
    resuming.py          how a run goes on from a checkpoint
    adapter.py           what PEFT alone can open
    durable.py           writes that survive a power cut
    agreement.py         what ranks agree on when one fails to write
    lives.py             the start number of a run

What is told:

    telemetry.py         bar, log lines, metrics.jsonl, boards
    memory_use.py        the peak of a rank's memory
    tensor_bytes.py      bytes of tensors that are alive
    flops.py             operations of a step, for MFU
"""
