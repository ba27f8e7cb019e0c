"""FP8 checkpoints: they give what their dequantised twins give, and every fault is an error that names it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.cache.pages import allocate_kv_cache
from specdec.config import EngineConfig
from specdec.errors import CheckpointError, SpecdecWarning
from specdec.kernels import AnyBackend, select
from specdec.kernels.fp8 import E4M3, Fp8Kind, Fp8Matrix, fp8_linear
from specdec.kernels.reference import ReferenceKernels
from specdec.loading import load_runtime, open_checkpoint, weight_bytes
from specdec.model.config import parse_config
from specdec.model.layers import Matrices
from specdec.model.weights import CheckpointIndex, LoadedModel, load_model
from specdec.step.batch import Extend, build_batch
from support.fakes import KERNELS, NEEDS_COMPILER, planted_tensors
from support.fp8_checkpoints import (
    CONFIG,
    dequantised,
    fp8_tensors,
    quantise,
    quantised_names,
    quantization_config,
    write,
    write_plain,
)

TENSORS = fp8_tensors(CONFIG, scale_dtype=torch.bfloat16)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
MTP = "model.layers.2."


def kernels(name: str = "reference", dtype: torch.dtype = torch.bfloat16) -> AnyBackend:
    return select(torch.device("cpu"), dtype, name, checkpoint_dtype=torch.bfloat16)


def load(folder: Path, backend: AnyBackend | None = None) -> LoadedModel:
    return load_model(CheckpointIndex.open(folder), backend or kernels())


def packed(model: LoadedModel) -> dict[str, Any]:
    return {
        f"{prefix}{path}.{name}": weight
        for part, prefix in model.parts()
        for path, module in part.named_modules()
        if isinstance(module, Matrices)
        for name, weight in module.packed.items()
    }


def assert_same_weights(a: LoadedModel, b: LoadedModel) -> None:
    first, second = packed(a), packed(b)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        pairs = [(weight, second[name])] if isinstance(weight, Tensor) else [
            (weight.data, second[name].data), (weight.scales, second[name].scales)]  # fmt: skip
        for x, y in pairs:
            assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)), name
    others = [plain_weights(model) for model in (a, b)]
    assert others[0].keys() == others[1].keys()
    assert all(torch.equal(x, others[1][name]) for name, x in others[0].items())


def plain_weights(model: LoadedModel) -> dict[str, Tensor]:
    """What no backend packs."""
    matrices = packed(model)
    named = {f"{prefix}{name}": p for part, prefix in model.parts() for name, p in part.named_parameters()}
    return {name: p for name, p in named.items() if name not in matrices}


@pytest.mark.slow
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", "bfloat16"),
        ("reference", "float32"),
        *(pytest.param("cpu", dtype, marks=NEEDS_COMPILER) for dtype in ("bfloat16", "float32", "int8")),
    ],
)
def test_loads_as_its_dequantised_twin(
    tmp_path: Path, backend: str, dtype: str, scale_dtype: torch.dtype, poisoned_empty: None
) -> None:
    """To the bit; int8 is quantised anew from bf16, as that of any checkpoint."""
    stored = getattr(torch, dtype)
    tensors = fp8_tensors(CONFIG, seed=1, scale_dtype=scale_dtype)
    plain = dequantised(tensors, torch.float32 if dtype == "float32" else torch.bfloat16)
    ours = load(write(tmp_path / "fp8", CONFIG, tensors), kernels(backend, stored))
    theirs = load(write_plain(tmp_path / "plain", CONFIG, plain), kernels(backend, stored))
    assert_same_weights(ours, theirs)
    assert packed(ours)[f"{MTP}mlp.experts.down"] is not None
    assert not any(list(part.buffers()) for part, _ in ours.parts()), "what is dequantised keeps no scales"


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_engine_generates_what_the_twin_does(tmp_path: Path, backend: str, dtype: str) -> None:
    """Speculating and not, at any temperature; "auto" is bf16 though the twin's is in fp32."""
    config = CONFIG | {"torch_dtype": "float32"}
    tensors = fp8_tensors(config, tensors=planted_tensors(config, seed=3, noise=0.5), scale_dtype=torch.bfloat16)
    dtypes = {"auto": torch.bfloat16, "float32": torch.float32}
    folder = write(tmp_path / "fp8", config, tensors)
    twin = write_plain(tmp_path / "plain", config, dequantised(tensors, dtypes[dtype]))
    params = [SamplingParams(max_tokens=24, temperature=t, seed=5, ignore_eos=True) for t in (0, 1)]
    outputs = []
    for path, asked in ((folder, dtype), (twin, dtypes[dtype])):
        engine = Engine.from_pretrained(path, dtype=asked, kernels=backend, max_model_len=128)
        assert engine.core.verifier.target.kernels.dtype == dtypes[dtype]
        outputs.append(engine.generate([[40, 50, 60], [70, 80]], params))
    for ours, theirs in zip(*outputs):
        assert ours.token_ids == theirs.token_ids
        assert ours.stats.accepted_per_position == theirs.stats.accepted_per_position
    assert sum(sum(output.stats.accepted_per_position) for output in outputs[0]) > 0


def test_scales_are_accepted_flat_and_as_columns_and_from_another_shard(tmp_path: Path) -> None:
    expected = load(write(tmp_path / "a", CONFIG, TENSORS))
    scales = {name: t for name, t in TENSORS.items() if name.endswith("_scale")}
    flat = {name: t.squeeze(1) for name, t in scales.items()}
    assert_same_weights(expected, load(write(tmp_path / "b", CONFIG, TENSORS | flat)))
    folder = write(tmp_path / "c", CONFIG, {name: t for name, t in TENSORS.items() if name not in scales})
    save_file(scales, str(folder / "a-scales.safetensors"))
    assert_same_weights(expected, load(folder))


def test_copies_in_the_mtp_layer_are_ignored_quantised_or_not(tmp_path: Path) -> None:
    """GLM-4.5's list of what is not quantised has the copy of the embeddings, but not that of the head."""
    head, scale = quantise(torch.randn(259, 32), torch.bfloat16)
    name = f"{MTP}shared_head.head.weight"
    copies = {f"{MTP}embed_tokens.weight": torch.zeros(259, 32), name: head, f"{name}_scale": scale}
    expected = load(write(tmp_path / "a", CONFIG, TENSORS))
    assert_same_weights(expected, load(write(tmp_path / "b", CONFIG, TENSORS | copies)))
    assert_same_weights(
        expected, load(write(tmp_path / "c", CONFIG, TENSORS | copies, ignore=[f"{MTP}shared_head.head"]))
    )


def test_layers_may_stay_plain(tmp_path: Path) -> None:
    """Whatever config.json says of them: the tensors decide. A grafted MTP layer is often not quantised."""
    plain = dequantised(TENSORS, torch.bfloat16)
    mixed = {n: t for n, t in TENSORS.items() if not n.startswith(MTP)}
    mixed |= {n: t for n, t in plain.items() if n.startswith(MTP)}
    assert_same_weights(load(write(tmp_path / "a", CONFIG, mixed)), load(write(tmp_path / "b", CONFIG, TENSORS)))


LAYER = "model.layers.0.self_attn."
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": (
        {f"{Q_PROJ}_scale": None},
        r"k_proj has a scale and .*0.self_attn.q_proj has none \(2 of 3",
    ),
    "no scale of an unmerged matrix": (
        {f"{O_PROJ}_scale": None},
        rf"^tensor {O_PROJ} has dtype torch.float8_e4m3fn, and there is no {O_PROJ}_scale: .*per output channel",
    ),
    "no scale of one expert": ({f"{EXPERT}_scale": None}, r"experts.3.up_proj has none \(23 of 24 have one\)"),
    "no weight": ({EXPERT: None}, rf"^the checkpoint lacks 1 tensor: {EXPERT}$"),
    "neither": ({EXPERT: None, f"{EXPERT}_scale": None}, r"experts.3.up_proj has none"),
    "plain weight": ({Q_PROJ: torch.zeros(64, 32)}, rf"^tensor {Q_PROJ} has dtype torch.float32, but as .*_scale is"),
    "other float8": ({Q_PROJ: torch.zeros(64, 32).to(torch.float8_e5m2)}, rf"^tensor {Q_PROJ} has dtype .*_e5m2, but"),
    "scale transposed": ({f"{Q_PROJ}_scale": torch.ones(1, 64)}, r"q_proj.weight_scale has shape \[1, 64\], .* \[64\]"),
    "scale of the inputs": ({f"{Q_PROJ}_scale": torch.ones(32, 1)}, r"q_proj.weight_scale has shape \[32, 1\]"),
    "scale per tensor": ({f"{Q_PROJ}_scale": torch.ones(1)}, r"q_proj.weight_scale has shape \[1\]"),
    "scale of integers": ({f"{Q_PROJ}_scale": torch.ones(64, 1).int()}, r"q_proj.weight_scale has dtype torch.int32"),
    "scale in fp8": ({f"{Q_PROJ}_scale": torch.ones(64, 1).to(E4M3)}, r"q_proj.weight_scale has dtype torch.float8"),
    "scale NaN": ({f"{Q_PROJ}_scale": torch.full((64, 1), float("nan"))}, r"weight_scale holds a negative or infinite"),
    "scale infinite": ({f"{Q_PROJ}_scale": torch.full((64, 1), float("inf"))}, r"weight_scale holds a negative or inf"),
    "scale negative": ({f"{Q_PROJ}_scale": -torch.ones(64, 1)}, r"weight_scale holds a negative or infinite"),
    "block-wise": (
        {f"{Q_PROJ}_scale_inv": torch.ones(1, 1)},
        r"holds 1 tensor: .*q_proj.weight_scale_inv, which are",
    ),
    "static": ({f"{LAYER}q_proj.input_scale": torch.ones(1)}, r"holds 1 tensor: .*q_proj.input_scale, which are not"),
    "packed": (
        {f"{LAYER}q_proj.weight_packed": torch.ones(8)},
        r"holds 1 tensor: .*q_proj.weight_packed, which are",
    ),
    "fused": ({"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 32, 32)}, r"experts.down_proj, unknown to this"),
    "ignored": (
        {f"{MTP}eh_proj.weight_scale": torch.ones(32, 1)},
        rf"holds {MTP}eh_proj.weight_scale, but quantization_config.ignore says that {MTP}eh_proj is not quantised",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(tmp_path: Path, fault: str) -> None:
    changes, message = FAULTS[fault]
    tensors = {name: t for name, t in (TENSORS | changes).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, CONFIG, tensors))


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.gate", "model.norm"])
def test_only_linear_layers_and_experts_can_be_quantised(tmp_path: Path, name: str) -> None:
    weight = TENSORS[f"{name}.weight"]
    tensors = TENSORS | {f"{name}.weight": weight.to(torch.float8_e4m3fn)}
    tensors[f"{name}.weight_scale"] = torch.ones(weight.shape[0], 1)
    with pytest.raises(CheckpointError, match=rf"1 tensor: {name}.weight_scale, which are not supported: of quantised"):
        load(write(tmp_path, CONFIG, tensors, ignore=[]))


def test_tensors_and_config_must_agree_that_there_is_fp8(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds .*_scale, but config.json has no quantization_config"):
        load(write_plain(tmp_path / "a", CONFIG, TENSORS))
    with pytest.raises(
        CheckpointError, match=r"has a quantization_config, but the checkpoint holds no \*.weight_scale"
    ):
        load(write(tmp_path / "b", CONFIG, dequantised(TENSORS, torch.bfloat16)))


class Fp8Kernels(ReferenceKernels):
    """Keeps FP8 matrices of some kinds; what the loader hands over is what it has packed."""

    def __init__(self, *kinds: Fp8Kind, device: str = "cpu") -> None:
        super().__init__(torch.device(device), torch.bfloat16)
        self.fp8 = frozenset(kinds)

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> Any:
        kind: Fp8Kind = "experts" if isinstance(weight, Fp8Matrix) and weight.values.dim() == 3 else "linear"
        return weight if kind in self.fp8 else super().pack(weight)

    pack_gate_up = pack


def test_a_backend_keeps_fp8_of_the_kinds_it_names(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIG, TENSORS)
    model = load(folder, Fp8Kernels("linear"))
    found = packed(model)
    down, qkv = found[f"{MTP}mlp.experts.down"], found[f"{MTP}self_attn.qkv_proj.weight"]
    assert (down.dtype, down.shape) == (torch.bfloat16, (8, 32, 32))
    assert isinstance(qkv, Fp8Matrix)
    for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        stored = f"{MTP}self_attn.{part}_proj.weight"
        assert torch.equal(qkv.values[rows].float(), TENSORS[stored].float())
        assert torch.equal(qkv.scales[rows], TENSORS[f"{stored}_scale"].squeeze(1).float())
    for name in ("model.layers.1.mlp.gate.weight", "lm_head.weight", f"{MTP}eh_proj.weight"):
        assert not isinstance(found[name], Fp8Matrix), name
    experts = packed(load(folder, Fp8Kernels("linear", "experts")))["model.layers.1.mlp.experts.gate_up"]
    assert torch.equal(experts.values[3, 32:].float(), TENSORS[EXPERT].float())
    assert torch.equal(experts.scales[3, 32:], TENSORS[f"{EXPERT}_scale"].squeeze(1).float())


class ComputingInFp8(Fp8Kernels):
    """Products in FP8 as on a GPU, grouped ones expert by expert."""

    def __init__(self) -> None:
        super().__init__("linear", "experts")

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return fp8_linear(x, weight, bias) if isinstance(weight, Fp8Matrix) else super().linear(x, weight, bias)

    def moe(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Any, down: Any) -> Tensor:
        def stack(experts: Fp8Matrix) -> list[Fp8Matrix]:
            return [Fp8Matrix(values, scales) for values, scales in zip(experts.values, experts.scales)]

        return super().moe(x, expert_ids, expert_weights, stack(gate_up), stack(down))  # type: ignore[arg-type]


def test_a_model_computes_in_fp8(tmp_path: Path) -> None:
    """Its logits differ from the dequantised ones by the rounding of activations, 2.5 % (rms) per product, eight in a
    row."""
    folder = write(tmp_path, CONFIG, TENSORS)
    batch = build_batch([Extend(list(range(3, 40)), 0, [0])], 64)
    logits = []
    for backend in (ComputingInFp8(), kernels()):
        model = load(folder, backend)
        cache = allocate_kv_cache(model.config, 3, 1, 64, torch.bfloat16, torch.device("cpu"))
        with torch.inference_mode():
            logits.append(model.target.compute_logits(model.target(batch.input_ids, batch.metadata, cache)))
    error = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    assert 0.005 < error < 0.1


def test_memory_is_counted_as_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a GPU that cannot read FP8 experts says what that costs."""
    checkpoint = open_checkpoint(write(tmp_path, CONFIG, TENSORS))
    scaled = checkpoint.index.scaled_modules()
    for backend in (Fp8Kernels(), Fp8Kernels("linear"), Fp8Kernels("linear", "experts")):
        model = load(tmp_path, backend)
        held = {id(weight): weight.nbytes for weight in (packed(model) | plain_weights(model)).values()}
        counted = weight_bytes(checkpoint.config, backend, True, scaled.__contains__, backend.fp8)
        assert counted == sum(held.values())
    cpu, cuda = Fp8Kernels("linear"), Fp8Kernels("linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_runtime(checkpoint, EngineConfig(num_pages=2), cpu)
    cuda.device = torch.device("meta")
    monkeypatch.setattr("specdec.loading.load_model", lambda *args, **kwargs: None)
    with pytest.warns(SpecdecWarning, match=r"have no FP8 experts on this device: .* torch.bfloat16 .* GiB of weights"):
        load_runtime(checkpoint, EngineConfig(num_pages=2), cuda)


def test_memory_from_a_config_honours_its_ignore_list() -> None:
    config = parse_config(CONFIG | {"quantization_config": quantization_config(CONFIG)})
    scheme = config.quantization
    assert scheme is not None
    itemsize = dict.fromkeys(quantised_names(CONFIG), 1)
    everything = weight_bytes(config, kernels(), True, scheme.covers)
    expected = sum(
        t.numel() * itemsize.get(name, 4 if ".mlp.gate." in name else 2)
        for name, t in TENSORS.items()
        if "_scale" not in name
    ) + sum(4 * t.numel() for name, t in TENSORS.items() if name.endswith("_scale"))
    assert everything == expected
    less = replace(scheme, ignore=(*scheme.ignore, r"re:model\.layers\.1\.mlp\.experts"))
    assert weight_bytes(config, kernels(), True, less.covers) == everything + 8 * 3 * (32 * 32 - 32 * 4)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"quantization_config.quant_method = 'fp8' is not supp"),
    ({"format": "pack-quantized"}, r"quantization_config.format = 'pack-quantized' is not supported"),
    ({"quantization_status": "frozen"}, r"quantization_status = 'frozen'"),
    ({"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme = {'num_bits': 8} is not supported"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config"),
    ({"transform_config": {"config_groups": {"R1": {}}}}, r"transform_config"),
    ({"config_groups": {}}, r"config_groups = {} is not supported"),
    ({"config_groups": {"a": 5}}, r"config_groups.a = 5 is not supported"),
    ({"ignore": "lm_head"}, r"ignore = 'lm_head' is not a list of names"),
    ({"ignore": ["re:("]}, r"ignore: 're:\(' holds no regular expression"),
]
GROUP_CHANGES: list[tuple[str, dict[str, Any] | None, str]] = [
    ("weights", {"num_bits": 4}, r"config_groups.group_0.weights.num_bits = 4 is not supported: of quantised weights"),
    ("weights", {"type": "int"}, r"weights.type = 'int'"),
    ("weights", {"strategy": "block", "block_structure": [128, 128]}, r"weights.strategy = 'block'"),
    ("weights", {"strategy": "tensor"}, r"weights.strategy = 'tensor'"),
    ("weights", {"strategy": "group", "group_size": 128}, r"weights.strategy = 'group'"),
    ("weights", {"symmetric": False}, r"weights.symmetric = False"),
    ("weights", None, r"weights = None"),
    ("input_activations", {"dynamic": False}, r"input_activations.dynamic = False"),
    ("input_activations", {"strategy": "tensor"}, r"input_activations.strategy = 'tensor'"),
    ("input_activations", {"num_bits": 16}, r"input_activations.num_bits = 16"),
    ("input_activations", None, r"input_activations = None"),
    ("output_activations", {"num_bits": 8}, r"output_activations = "),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_other_formats_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(CONFIG | {"quantization_config": quantization_config(CONFIG, **changes)})


@pytest.mark.parametrize(("part", "changes", "message"), GROUP_CHANGES)
def test_other_schemes_are_refused(part: str, changes: dict[str, Any] | None, message: str) -> None:
    raw: Any = json.loads(json.dumps(quantization_config(CONFIG)))
    group = raw["config_groups"]["group_0"]
    group[part] = changes if changes is None else (group[part] or {}) | changes
    with pytest.raises(CheckpointError, match=message):
        parse_config(CONFIG | {"quantization_config": raw})


@pytest.mark.parametrize(
    ("targets", "ignore", "covered"),
    [
        (["Linear"], ["lm_head"], {"model.layers.1.mlp.experts.0.up_proj", "model.layers.1.self_attn.q_proj"}),
        (["Linear"], ["re:.*self_attn"], {"model.layers.1.mlp.experts.0.up_proj", "lm_head"}),
        (["re:.*experts.*"], [], {"model.layers.1.mlp.experts.0.up_proj"}),
        (["lm_head", "re:layers"], [], {"lm_head"}),
        (["Linear"], ["model.layers.1.self_attn"], {"model.layers.1.mlp.experts.0.up_proj",
                                                    "model.layers.1.self_attn.q_proj", "lm_head"}),
    ],
)  # fmt: skip
def test_names_are_matched_as_compressed_tensors_does(targets: list[str], ignore: list[str], covered: set[str]) -> None:
    """A name as a whole, an expression from the name's start."""
    raw = quantization_config(CONFIG, ignore=ignore)
    raw["config_groups"]["group_0"]["targets"] = targets
    scheme = parse_config(CONFIG | {"quantization_config": raw}).quantization
    assert scheme is not None
    names = {"model.layers.1.mlp.experts.0.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"}
    assert {name for name in names if scheme.covers(name)} == covered
