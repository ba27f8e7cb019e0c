"""The conversation with a peer, its errors and its end; fake interpreters stand in for engines."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.eval.speed.peers import Peer, PeerError, PeerSpec, Settings, parse_peer
from specdec.eval.speed.planted import PlantedShape, planted_prompts, write_planted_checkpoint
from support.planted_text import greedy_text

MakePeer = Callable[..., Peer]
SHAPE = PlantedShape(128, 2, 2, 1, 32, 64, 32, 4, 2, vocab_size=512, max_position_embeddings=256)

# Counts upwards; drafts and accepts K tokens per prompt; prints where engines do.
COUNTING_ENGINE = """
    import os, sys
    sys.path.append(sys.argv[3])
    from peer_drivers.protocol import Answer, serve

    def load(settings):
        print("loading", settings.checkpoint)
        def generate(prompts, max_tokens):
            print("generating")
            os.write(1, b"from C\\n")
            k = settings.num_speculative_tokens
            texts = [[prompt[-1] + 1 + i for i in range(max_tokens)] for prompt in prompts]
            return Answer(0.25, texts, k * len(prompts), k * len(prompts))
        return f"counting {os.environ['OMP_NUM_THREADS']} {os.getcwd()}", generate

    del sys.argv[1]
    serve(load)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        checkpoint=str(tmp_path),
        work_folder=str(tmp_path),
        dtype="float32",
        num_threads=1,
        num_speculative_tokens=2,
        max_num_seqs=3,
        max_model_len=40,
    )


@pytest.fixture
def make_peer(tmp_path: Path, settings: Settings) -> MakePeer:
    """A peer whose interpreter is the given program; argv is [program, -c, bootstrap, settings, folder, module]."""

    def make(source: str, **changes: object) -> Peer:
        program = tmp_path / "python"
        program.write_text(f"#!{sys.executable}\nimport sys\ndel sys.argv[1]\n{textwrap.dedent(source)}")
        program.chmod(0o755)
        return Peer(PeerSpec("llamacpp", program), replace(settings, **changes))

    return make


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_peer_answers_request_after_request_whatever_it_prints(make_peer: MakePeer, tmp_path: Path) -> None:
    with make_peer(COUNTING_ENGINE) as peer:
        assert peer.version == f"counting 1 {tmp_path}"
        run = peer.generate([[5, 6], [9]], 3)
        assert (run.seconds, run.token_ids) == (0.25, [[7, 8, 9], [10, 11, 12]])
        assert (run.num_draft_tokens, run.num_accepted_tokens) == (4, 4)
        assert peer.generate([[1]], 1).token_ids == [[2]]
        pid = peer._process.pid
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [
        ([], 1, r"0 prompts at once: llamacpp takes 1 to 3 with max_num_seqs = 3"),
        ([[1]] * 4, 1, "4 prompts at once"),
        ([[1], []], 1, "each must be at least 1"),
        ([[1]], 0, "max_tokens = 0: each must be at least 1"),
        ([[1] * 39], 2, "39 prompt tokens and max_tokens = 2: .* at most max_model_len = 40"),
    ],
)
def test_a_request_without_room_is_refused_and_the_peer_goes_on(
    make_peer: MakePeer, prompts: list[list[int]], max_tokens: int, message: str
) -> None:
    with make_peer(COUNTING_ENGINE) as peer:
        with pytest.raises(PeerError, match=message):
            peer.generate(prompts, max_tokens)
        assert peer.generate([[1]], 1).token_ids == [[2]]


def test_transformers_drafts_for_one_prompt_at_a_time(settings: Settings) -> None:
    peer = Peer(PeerSpec("transformers", Path(sys.executable)), replace(settings, num_speculative_tokens=1))
    with pytest.raises(PeerError, match="2 prompts at once: transformers takes 1 to 1"):
        peer.generate([[1], [2]], 1)


def test_a_missing_package_is_named_with_the_remedy(make_peer: MakePeer) -> None:
    with (
        pytest.raises(PeerError, match=r"status 1 when it was to load(.|\n)*'no_such'(.|\n)*must have: xllamacpp gguf"),
        make_peer("import no_such"),
    ):
        pass


def test_a_driver_that_dies_shows_its_last_words(make_peer: MakePeer) -> None:
    source = COUNTING_ENGINE.replace('print("generating")', "sys.exit('out of luck')")
    with make_peer(source) as peer:
        with pytest.raises(PeerError, match=r"status 1 when it was to generate 1 x 4 tokens(.|\n)*out of luck") as died:
            peer.generate([[1]], 4)
        assert "must have" not in str(died.value)
        with pytest.raises(PeerError, match="ended with status 1"):
            peer.generate([[1]], 4)


def test_a_driver_that_hangs_is_ended(make_peer: MakePeer) -> None:
    source = COUNTING_ENGINE.replace('print("generating")', "import time; time.sleep(60)")
    with make_peer(source) as peer:
        peer.timeout_s = 0.5  # for the answer; starting may take longer on a busy machine
        with pytest.raises(PeerError, match=r"took more than timeout_s = 0\.5 to generate 1 x 4 tokens"):
            peer.generate([[1]], 4)
        assert not is_running(peer._process.pid)


def test_too_few_tokens_are_an_error(make_peer: MakePeer) -> None:
    with (
        make_peer(COUNTING_ENGINE.replace("range(max_tokens)", "range(2)")) as peer,
        pytest.raises(PeerError, match=r"llamacpp gave \[2\] tokens, 4 for each of 1 prompts asked"),
    ):
        peer.generate([[1]], 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int4"}, "dtype = 'int4' is unknown: choose one of bfloat16, float32"),
        ({"num_speculative_tokens": 9}, "num_speculative_tokens = 9: llamacpp drafts 0 to 8"),
        ({"num_threads": 0}, "num_threads = 0 must be at least 1"),
        ({"checkpoint": "somewhere"}, "checkpoint = 'somewhere' must be the absolute path of an existing folder"),
        ({"work_folder": "/nowhere"}, "work_folder = '/nowhere' must be the absolute path"),
    ],
)
def test_settings_that_cannot_be_are_refused(make_peer: MakePeer, change: dict, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        make_peer("", **change)


def test_an_interpreter_that_is_no_program_is_refused(tmp_path: Path, settings: Settings) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/python\n")
    broken.chmod(0o755)
    with pytest.raises(PeerError, match="broken cannot be started"), Peer(PeerSpec("vllm", broken), settings):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llamacpp", "must be NAME=INTERPRETER"),
        ("vllm=", "must be NAME=INTERPRETER"),
        ("tgi=/bin/sh", "peer 'tgi' is unknown: choose one of transformers, llamacpp, vllm"),
        ("vllm=/nowhere/python", "vllm: /nowhere/python is no program"),
        ("vllm=/tmp", "vllm: /tmp is no program"),
    ],
)
def test_a_peer_that_cannot_be_parsed(text: str, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        parse_peer(text)


@pytest.mark.slow
def test_transformers_as_a_peer_drafts_with_the_mtp_layer(tmp_path: Path, settings: Settings) -> None:
    checkpoint = tmp_path / "planted"
    write_planted_checkpoint(checkpoint, SHAPE)
    prompt = planted_prompts(SHAPE.vocab_size, 1, 4)
    changes = replace(settings, checkpoint=str(checkpoint), num_speculative_tokens=1)
    with Peer(parse_peer(f"transformers={sys.executable}"), changes) as peer:
        run = peer.generate(prompt, 20)
    assert peer.version.startswith("transformers 5")
    assert run.token_ids == [greedy_text(checkpoint, prompt[0], 20)]
    assert run.num_draft_tokens == 10
