"""From what the user has to tokens. Files in the order in which data pass through them.

A log of interactions:

    corpus.py          the whole of it: items, users, windows in three splits; begin here
    readers/           one file for each format; adding a format is adding a file
    interactions.py    rating filter, k-core, windows, the split in time
    columns.py         windows as columns, which become samples when they are asked for
    arrow_words.py     byte strings laid end to end, quickly
    window_facts.py    digest of all windows, and which of them two splits share
    unused.py          settings that nothing reads, told
    popularity.py      how often train has each item
    kept.py            folders of arrays in the cache, mapped by every process
    log_cache.py       a prepared log as such a folder
    looking.py         a look at data without reading them, for gdrt-init

Its tokens:

    catalogue.py       the titles that can be recommended, each once
    templates.py       the literal pieces of a prompt
    kept_prompt.py     the prompt of a run that is resumed, where it has a date
    prompts.py         samples as tokens, with the segment of each
    coded_windows.py   windows as numbers of catalogue entries
    window_store.py    their tokens, laid together when they are asked for
    growing.py         windows that grow from a common start
    trie.py            the token trie over the catalogue
    trie_file.py       that trie as a file

Rows of prompt and completion:

    text_rows.py       the record, and the check of one row
    mixture.py         several data sets in one run
    row_prompts.py     rows as tokens

What training sees, of both:

    training_data.py   what training needs of a data set: the protocol
    token_facts.py     one value for every target token, held small
    recommendation.py  the protocol for windows over a catalogue
    supervised.py      the protocol for rows
    sources.py         which of the two `data.path` is
"""
