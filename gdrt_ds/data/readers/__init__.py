"""Readers of data, one family of file formats per module; `data.format` takes the module's name.

    amazon_reviews.py   reviews and metadata, 2018 and 2023
    movielens.py        ml-100k, ml-1m, ml-latest, and the ml-100k of recbole
    planted.py          generated data in which it is known who needs the history
    sft.py              rows of prompt and completion
    table.py            interactions, items and users as tables
    windows.py          ready-made windows of MSL, LBR and BIGRec
    base.py             what all of them share: records, bad rows, reading of values
    _rows.py            rows of any table file, with their line numbers
    _datasets.py        rows of parquet, CSV and Arrow, by the library `datasets`
    _columns.py         a log as columns, by the same library
    _hub.py             data sets of the Hugging Face hub, made to files

Each hands `base.Windows`, `base.Interactions` or `base.InteractionColumns` to `corpus`; sft.py hands rows to
`supervised`.
"""
