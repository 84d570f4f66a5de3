"""Configurations: every mistake is one clear line, plain data round trips, and the digest follows its three scopes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field, fields, make_dataclass

import pytest
import yaml
from conftest import EXPERT_RACE, ROUTERS, TOKEN_CHOICE, model_config, one_line, run_config, run_data

from diffmoe import config as config_module
from diffmoe.config import (
    INFERENCE,
    ConfigError,
    DataConfig,
    ModelConfig,
    RouterConfig,
    RunConfig,
    TrainingConfig,
    digest,
    from_dict,
    load_config,
    resolve_router,
    to_dict,
)
from diffmoe.moe.expert_choice import ExpertChoice, ExpertChoiceConfig

ROUTER = "model.moe.router"
TC, RACE = {ROUTER: {"kind": TOKEN_CHOICE}}, {ROUTER: {"kind": EXPERT_RACE}}
NAN = float("nan")

# (changes to a good configuration by dotted key, what the message must name: the key, and the value or remedy)
MISTAKES = {
    "unknown key": ({"training.colour": 3}, ("training.colour", "batch_size")),
    "unknown section": ({"trainer": {}}, ("trainer", "did you mean training?")),
    "mistyped key": ({"training.batch_sise": 3}, ("training.batch_sise", "did you mean batch_size?")),
    "mistyped router key": ({f"{ROUTER}.pol": "sample"}, ("moe.router.pol", "did you mean pool?")),
    "another router's key": (TC | {f"{ROUTER}.pool": "batch"}, ("moe.router.pool", "balance_loss_weight")),
    "text for a number": ({"training.learning_rate": "fast"}, ("training.learning_rate", "'fast'")),
    "fraction for a whole number": ({"model.depth": 2.5}, ("model.depth", "2.5", "whole number")),
    "whole float for a whole number": ({"model.moe.num_experts": 4.0}, ("moe.num_experts", "4.0")),
    "bool for a whole number": ({"model.depth": True}, ("model.depth", "True", "whole number")),
    "bool for a number": ({"model.moe.capacity": True}, ("moe.capacity", "True")),
    "number for a bool": ({"model.learn_sigma": 1}, ("model.learn_sigma", "1", "true or false")),
    "number for a text": ({"data.name": 3}, ("data.name", "3")),
    "null for a number": ({"model.depth": None}, ("model.depth", "None")),
    "null for a section": ({"training": None}, ("training", "None", "mapping")),
    "text for a section": ({ROUTER: "expert_choice"}, ("moe.router", "expert_choice", "mapping")),
    "unknown choice": ({"sampling.sampler": "rk4"}, ("sampling.sampler", "rk4", "euler")),
    "unknown choice of a router": ({f"{ROUTER}.pool": "world"}, ("moe.router.pool", "world", "sample")),
    "list for a choice": ({"diffusion.process": ["flow"]}, ("diffusion.process", "flow")),
    "newline in a choice": ({"diffusion.process": "fl\now"}, ("diffusion.process",)),
    "newline in a key": ({"two\nlines": 1}, ("unknown key",)),
    "unknown size": ({"model.size": "M"}, ("model.size", "M", "XL")),
    "list for a size": ({"model.size": ["S"]}, ("model.size", "S", "XL")),
    "zero": ({"training.batch_size": 0}, ("training.batch_size", "0")),
    "negative": ({"training.learning_rate": -1.0}, ("training.learning_rate", "-1.0")),
    "not a number": ({"training.learning_rate": NAN}, ("training.learning_rate", "nan")),
    "negative weight decay": ({"training.weight_decay": -1.0}, ("training.weight_decay", "-1.0")),
    "weight decay not a number": ({"training.weight_decay": NAN}, ("training.weight_decay", "nan")),
    "guidance not a number": ({"sampling.guidance_scale": NAN}, ("sampling.guidance_scale", "nan")),
    "eta above one": ({"sampling.ddim_eta": 2.0}, ("sampling.ddim_eta", "2.0")),
    "budget between steps": ({"training.budgets": [6]}, ("training.budgets", "batch_size=4")),
    "budget of the whole run": ({"training.budgets": [40]}, ("training.budgets", "num_images=40")),
    "budget that is not kept": ({"evaluation.budget_images": 8}, ("evaluation.budget_images", "8")),
    "average that is not kept": ({"evaluation.ema_half_life_images": 500}, ("evaluation.ema_half_life_images", "500")),
    "average kept twice": ({"training.extra_ema_half_lives": [5, 5.0]}, ("training.extra_ema_half_lives", "5.0")),
    "average wider than all steps alike": ({"training.ema_width": 0.3}, ("training.ema_width", "0.3")),
    "average of no half-life": ({"training.extra_ema_half_lives": [0]}, ("training.extra_ema_half_lives", "0")),
    "number for a list": ({"training.extra_ema_half_lives": 5}, ("training.extra_ema_half_lives", "5", "list")),
    "text in a list": ({"training.extra_ema_half_lives": ["a"]}, ("training.extra_ema_half_lives", "'a'")),
    "moment that never forgets": ({"training.adam_beta2": 1.0}, ("training.adam_beta2", "1.0")),
    "clip at zero": ({"training.clip_norm": 0}, ("training.clip_norm", "0", "null")),
    "negative warm-up": ({"training.warmup_images": -1}, ("training.warmup_images", "-1")),
    "half a batch": ({"training.num_images": 41}, ("training.num_images", "41", "batch_size=4")),
    "dropout of one": ({"model.class_dropout_prob": 1.0}, ("model.class_dropout_prob", "1.0")),
    "heads don't divide": ({"model.num_heads": 5}, ("model.hidden_size", "32", "num_heads=5")),
    "width not a multiple of 4": ({"model.hidden_size": 34, "model.num_heads": 2}, ("model.hidden_size", "34")),
    "patches don't divide": ({"model.input_size": 9}, ("model.input_size", "9", "patch_size=2")),
    "hidden width not whole": ({"model.mlp_ratio": 4.01}, ("model.mlp_ratio", "4.01", "hidden_size=32")),
    "sampler of another process": ({"sampling.sampler": "ddim"}, ("sampling.sampler", "ddim", "flow", "heun")),
    "process of another sampler": ({"diffusion.process": "ddpm"}, ("sampling.sampler", "euler", "ddpm", "ancestral")),
    "ddpm without sigma": ({"diffusion.process": "ddpm", "sampling.sampler": "ddim", "model.learn_sigma": False},
                           ("model.learn_sigma", "False")),
    "too many guided channels": ({"sampling.guided_channels": 9}, ("sampling.guided_channels", "9")),
    "guidance without null label": ({"sampling.guidance_scale": 2.0, "model.class_dropout_prob": 0.0},
                                    ("sampling.guidance_scale", "2.0", "class_dropout_prob")),
    "experts of no width": ({"model.moe.expert_ratio": 0}, ("moe.expert_ratio", "0")),
    "expert's width not whole": ({"model.moe.expert_ratio": 0.01}, ("moe.expert_ratio", "0.01", "hidden_size=32")),
    "negative shared experts": ({"model.moe.shared_experts": -1}, ("moe.shared_experts", "-1")),
    "no router": ({ROUTER: {}}, ("moe.router.kind",)),
    "router of no module": ({f"{ROUTER}.kind": "nowhere.at_all:Router"}, ("moe.router.kind", "nowhere.at_all:Router")),
    "router of no name": ({f"{ROUTER}.kind": "diffmoe"}, ("moe.router.kind", "diffmoe", "expert_choice")),
    "router not in module": ({f"{ROUTER}.kind": "baselines.token_choice:X"}, ("moe.router.kind", "token_choice:X")),
    "router relative to nothing": ({f"{ROUTER}.kind": ".token_choice:X"}, ("moe.router.kind", ".token_choice:X")),
    "router that is none": ({f"{ROUTER}.kind": "collections:OrderedDict"}, ("moe.router.kind", "OrderedDict")),
    "router not a text": ({f"{ROUTER}.kind": 7}, ("moe.router.kind", "7")),
    "less than a token": ({"model.moe.capacity": 0.01}, ("moe.capacity", "0.01", "0.16 tokens")),
    "more experts than tokens": ({f"{ROUTER}.pool": "sample", "model.moe.num_experts": 17},
                                 ("moe.capacity", "17 experts", "16")),
    "more capacity than experts": ({"model.moe.capacity": 4.5}, ("moe.capacity", "4.5", "num_experts=4")),
    "dynamic without predictor": ({f"{ROUTER}.predictor": False}, ("moe.router.inference", "dynamic", "predictor")),
    "pool doesn't divide the batch": ({f"{ROUTER}.pool_images": 3}, ("moe.router.pool_images", "3", "batch_size=4")),
    "pool of no image": ({f"{ROUTER}.pool_images": 0}, ("moe.router.pool_images", "0")),
    "pool of images a sample": ({f"{ROUTER}.pool": "sample", f"{ROUTER}.pool_images": 2},
                                ("moe.router.pool_images", "2", "sample")),
    "threshold decay of one": ({f"{ROUTER}.threshold_decay": 1.0}, ("moe.router.threshold_decay", "1.0")),
    "negative predictor weight": ({f"{ROUTER}.predictor_loss_weight": -1}, ("predictor_loss_weight", "-1")),
    "global threshold not a number": ({f"{ROUTER}.global_threshold": NAN}, ("moe.router.global_threshold", "nan")),
    "negative calibration": ({f"{ROUTER}.calibration_batches": -1}, ("calibration_batches", "-1")),
    "calibration without predictor": (
        {f"{ROUTER}.calibration_batches": 2, f"{ROUTER}.predictor": False, f"{ROUTER}.inference": "static"},
        ("calibration_batches", "2", "predictor")),
    "negative warm-up of routing": ({f"{ROUTER}.warmup_steps": -1}, ("router.warmup_steps", "-1")),
    "warm-up of routing without predictor": (
        {f"{ROUTER}.warmup_steps": 2, f"{ROUTER}.predictor": False, f"{ROUTER}.inference": "static"},
        ("router.warmup_steps", "2", "predictor")),
    "unknown gate": ({f"{ROUTER}.gate_normalisation": "tanh"}, ("gate_normalisation", "tanh", "sigmoid")),
    "TC capacity not whole": (TC | {"model.moe.capacity": 1.5}, ("moe.capacity", "1.5", "whole")),
    "TC capacity above experts": (TC | {"model.moe.capacity": 5}, ("moe.capacity", "5", "num_experts=4")),
    "TC negative weight": (TC | {f"{ROUTER}.balance_loss_weight": -0.5}, ("balance_loss_weight", "-0.5")),
    "race capacity above experts": (RACE | {"model.moe.capacity": 5}, ("moe.capacity", "5", "num_experts=4")),
    "race negative weight": (RACE | {f"{ROUTER}.similarity_loss_weight": -0.5}, ("similarity_loss_weight", "-0.5")),
    "race without a pair": (RACE | {"model.moe.capacity": 0.01}, ("moe.capacity", "0.01")),
}


@pytest.mark.parametrize(("changes", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key_and_the_value(changes, named):
    with pytest.raises(ConfigError) as caught:
        run_config(changes)
    message = one_line(caught.value)
    assert [part for part in named if part not in message] == [], message


@pytest.mark.parametrize("key", ["model", "data", "training", "model.depth", "data.name", "training.batch_size",
                                 "model.moe.router", "model.moe.num_experts"])
def test_a_missing_key_is_named_with_its_path(key):
    data = run_data()
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    del node[last]
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, data)
    assert f"{key}: missing" in one_line(caught.value)


# ---------------------------------------------------------------- plain data


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_a_run_survives_plain_data_json_and_yaml(router):
    config = run_config({"training.clip_norm": 1, "sampling.guided_channels": 3, "runtime.backend": "loop"}, router)
    plain = to_dict(config)
    assert from_dict(RunConfig, plain) == config
    assert from_dict(RunConfig, json.loads(json.dumps(plain))) == config
    assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(plain))) == config
    if router:
        assert type(config.model.moe.router) is resolve_router(ROUTERS[router]["kind"]).Config


@pytest.mark.parametrize(("written", "value"), [("1e-4", 1e-4), ("2E3", 2000.0), (3, 3.0), (0.5, 0.5)])
def test_numbers_that_yaml_reads_as_text_or_int_become_floats(written, value):
    rate = run_config({"training.learning_rate": written}).training.learning_rate
    assert rate == value and type(rate) is float


def test_a_size_stands_for_width_depth_and_heads_and_gives_way_to_a_key_beside_it():
    data = run_data()["model"]
    for key in ("hidden_size", "depth", "num_heads"):
        del data[key]
    model = from_dict(ModelConfig, data | {"size": "S", "depth": 3})
    assert (model.hidden_size, model.depth, model.num_heads) == (384, 3, 6)


def test_the_default_ema_halves_at_the_rate_of_0_9999_a_step_of_256_images():
    training = from_dict(TrainingConfig, {"batch_size": 256, "num_images": 256})
    assert training.ema_decay(1) == pytest.approx(0.9999, abs=1e-9)
    short = from_dict(TrainingConfig, {"batch_size": 50, "num_images": 100, "ema_half_life_images": 200})
    assert short.ema_decay(1)**4 == pytest.approx(0.5)


# ---------------------------------------------------------------- files


@pytest.fixture
def write(tmp_path):
    def write_yaml(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path
    return write_yaml


def test_a_later_file_is_laid_over_the_earlier_ones_and_overrides_over_both(write):
    scale = write("scale.yaml", run_data({"training.learning_rate": 3.0, "training.weight_decay": 2.0}))
    system = write("system.yaml", "training: {weight_decay: 1e-3}\nmodel: {moe: {num_experts: 8}}")
    config = load_config([scale, system], ["training.learning_rate=1e-4", "model.moe.router.selection=predictor",
                                           "training.clip_norm=null", "runtime.backend=loop"])
    expected = {"training.learning_rate": 1e-4, "training.weight_decay": 1e-3, "model.moe.num_experts": 8,
                f"{ROUTER}.selection": "predictor", "runtime.backend": "loop"}
    assert config == run_config(expected)


def test_a_file_can_make_a_system_dense_and_another_router_takes_its_place(write):
    scale = write("scale.yaml", run_data())
    assert load_config([scale, write("dense.yaml", "model: {moe: null}")]).model.moe is None
    tc = load_config([scale, write("tc.yaml", {"model": {"moe": {"router": {"kind": TOKEN_CHOICE}}}})])
    assert tc == run_config(router="tc")


def test_a_file_that_names_another_router_drops_the_options_of_the_former(write):
    scale = write("scale.yaml", run_data({f"{ROUTER}.selection": "predictor"}))
    tc = load_config([scale, write("tc.yaml", {"model": {"moe": {"router": {"kind": TOKEN_CHOICE}}}})])
    assert tc == run_config(router="tc")


def test_a_size_in_a_later_file_replaces_the_shape_of_an_earlier_one(write):
    paths = [write("scale.yaml", run_data()), write("size.yaml", "model: {size: S}")]
    assert load_config(paths).model.hidden_size == 384


@pytest.mark.parametrize(("override", "named"), [
    ("training.batch_size", "key.path=value"), ("=3", "key.path=value"), ("training.batch_size=[", "YAML"),
    ("training.batch_size=3=4", "training.batch_size"), ("training.batch_size.x=3", "training.batch_size"),
    ("training.batchsize=3", "did you mean batch_size?"), ("training..x=1", "training."), ("training=3", "training")])
def test_an_override_that_cannot_be_used_is_one_line(write, override, named):
    with pytest.raises(ConfigError) as caught:
        load_config([write("run.yaml", run_data())], [override])
    assert named in one_line(caught.value)


@pytest.mark.parametrize("content", ["a: [1\nb: }", "- 1\n- 2", "", "just text", "training: {batch_size: 1}", "1: 2"])
def test_a_file_that_holds_no_run_is_one_line(write, content):
    with pytest.raises(ConfigError) as caught:
        load_config([write("bad.yaml", content)])
    one_line(caught.value)


def test_a_key_written_twice_in_a_file_is_an_error_and_not_the_last_one_wins(write):
    text = yaml.safe_dump(run_data()) + "data: {name: cifar10}\n"
    with pytest.raises(ConfigError) as caught:
        load_config([write("twice.yaml", text)])
    assert "data" in one_line(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, tmp_path / "missing.yaml", tmp_path / "binary.yaml"):
        with pytest.raises(ConfigError) as caught:
            load_config([path])
        assert str(path) in one_line(caught.value)


# ---------------------------------------------------------------- digest

BASE = run_config()
DDPM = {"diffusion.process": "ddpm", "sampling.sampler": "ddim"}
# One change of every field. A new field must be added here, which is where its scope is decided.
TRAINING_CHANGES = {
    "model.hidden_size": 64, "model.depth": 3, "model.num_heads": 8, "model.input_size": 16, "model.patch_size": 4,
    "model.in_channels": 1, "model.num_classes": 11, "model.mlp_ratio": 2, "model.class_dropout_prob": 0.2,
    "model.learn_sigma": False, "model.moe.num_experts": 8, "model.moe.capacity": 2, "model.moe.interleave": False,
    "model.moe.shared_experts": 1, "model.moe.pool_scope": "global", "model.moe.expert_ratio": 2,
    f"{ROUTER}.pool": "sample", f"{ROUTER}.pool_images": 2,
    f"{ROUTER}.predictor_loss_weight": 0.01, f"{ROUTER}.threshold_decay": 0.9, f"{ROUTER}.threshold_debias": True,
    f"{ROUTER}.gate_normalisation": "sigmoid", f"{ROUTER}.warmup_steps": 3,
    "data.name": "cifar10", "data.horizontal_flip": True, "data.resize": True,
    "training.batch_size": 8, "training.num_images": 80, "training.expert_rate": 0.5,
    "training.learning_rate": 1e-3, "training.weight_decay": 0.1, "training.warmup_images": 4,
    "training.clip_norm": 1.0, "training.ema_half_life_images": 100, "training.ema_width": 0.1,
    "training.ema_buffers": "average", "training.precision": "bf16", "training.tf32": True, "training.adam_beta2": 0.95,
    "training.extra_ema_half_lives": [1000], "training.budgets": [16],
}
INFERENCE_CHANGES = {
    "sampling.sampler": "heun", "sampling.num_steps": 10, "sampling.batch_size": 7, "sampling.guidance_scale": 1.5,
    "sampling.guided_channels": 3, "sampling.guided_forward": "joint", "sampling.ddim_eta": 1,
    "sampling.clip_denoised": True, f"{ROUTER}.inference": "static", f"{ROUTER}.selection": "predictor",
    f"{ROUTER}.global_threshold": 0.5, f"{ROUTER}.calibration_batches": 4, "evaluation.extractor": "digits64",
    "evaluation.num_samples": 2000, "evaluation.kid_subset_size": 100,
    "evaluation.second_extractor": "cifar64", "evaluation.memorisation": True,
}
RUNTIME_CHANGES = {"runtime.device": "cpu", "runtime.backend": "loop", "runtime.compile": True,
                   "runtime.micro_batch_size": 4, "runtime.max_skipped_steps": 0, "runtime.parallel": "fsdp",
                   "data.path": "images", "data.cache": "cache", "evaluation.extractor_weights": "weights.safetensors",
                   "data.vae": "vae", "evaluation.reference": "reference.npz"}
CHANGES = [  # (changed keys, the training digest changes, the inference digest changes)
    *(({key: value}, True, True) for key, value in TRAINING_CHANGES.items()),
    ({f"{ROUTER}.predictor": False, f"{ROUTER}.inference": "static"}, True, True),
    ({"training.extra_ema_half_lives": [500], "evaluation.ema_half_life_images": 500}, True, True),
    ({"training.budgets": [8], "evaluation.budget_images": 8}, True, True),
    ({ROUTER: {"kind": EXPERT_RACE}}, True, True), ({"model.moe": None}, True, True), (DDPM, True, True),
    *(({key: value}, False, True) for key, value in INFERENCE_CHANGES.items()),
    *(({key: value}, False, False) for key, value in RUNTIME_CHANGES.items()),
]


@pytest.mark.parametrize(("chosen", "cuda", "cpu"), [(None, True, False), (True, True, True), (False, False, False)])
def test_null_compiles_on_a_gpu_alone(chosen, cuda, cpu):
    runtime = run_config({"runtime.compile": chosen}).runtime
    assert (runtime.compiles("cuda"), runtime.compiles("cpu")) == (cuda, cpu)


def both_digests(config) -> tuple[str, str]:
    return digest(config, scope="training"), digest(config, scope="inference")


@pytest.mark.parametrize(("changes", "training", "inference"), CHANGES, ids=lambda value: "+".join(value)
                         if isinstance(value, dict) else "")
def test_a_change_moves_the_digests_of_its_scope_and_no_other(changes, training, inference):
    before, after = both_digests(BASE), both_digests(run_config(changes))
    assert tuple(old != new for old, new in zip(before, after, strict=True)) == (training, inference)


def test_rows_that_sample_different_averages_of_a_run_share_its_checkpoint():
    kept = {"training.extra_ema_half_lives": [500, 2000]}
    one, other = (run_config(kept | {"evaluation.ema_half_life_images": life}) for life in (500, None))
    assert both_digests(one)[0] == both_digests(other)[0] and both_digests(one)[1] != both_digests(other)[1]


def test_the_changes_above_cover_every_field_of_a_run():
    def paths(node, path=""):
        for spec in fields(node):
            value = getattr(node, spec.name)
            nested = dataclasses.is_dataclass(value)
            yield from paths(value, f"{path}{spec.name}.") if nested else [f"{path}{spec.name}"]
    changed = {key for changes, *_ in CHANGES for key in changes} | {f"{ROUTER}.kind"}
    assert set(paths(BASE)) - changed == set()


def test_digests_of_all_changes_differ_from_one_another():
    digests = [digest(run_config(changes)) for changes, _, inference in CHANGES if inference]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_a_hash_of_the_settings_that_are_not_default():
    config = run_config({"training.weight_decay": 0.25, "sampling.sampler": "heun", "model.moe.capacity": 2}, "tc")
    training = {
        "data.name": "digits", "model.depth": 4.0, "model.hidden_size": 32.0, "model.in_channels": 3.0,
        "model.input_size": 8.0, "model.moe.capacity": 2.0, "model.moe.num_experts": 4.0,
        "model.moe.router.kind": TOKEN_CHOICE, "model.num_classes": 10.0, "model.num_heads": 4.0,
        "model.patch_size": 2.0, "training.batch_size": 4.0, "training.num_images": 40.0,
        "training.weight_decay": 0.25}
    contents = training, training | {"sampling.sampler": "heun"}
    assert both_digests(config) == tuple(
        hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
        for content in contents)


def test_writing_a_default_out_and_int_for_float_change_no_digest():
    explicit = {"training.weight_decay": 0, "model.moe.capacity": 1, f"{ROUTER}.threshold_decay": 0.95,
                "sampling.guidance_scale": 1, f"{ROUTER}.pool": "batch", "sampling.sampler": "euler"}
    assert both_digests(run_config(explicit)) == both_digests(BASE)
    moe = BASE.model.moe
    for integer, floating in ((1, 1.0), (2, 2.0)):
        same = [dataclasses.replace(moe, capacity=value) for value in (integer, floating)]
        assert digest(same[0]) == digest(same[1])


@pytest.mark.parametrize("section", [ModelConfig, TrainingConfig, DataConfig])
def test_a_new_field_whose_default_keeps_the_old_behaviour_changes_no_digest(section):
    extended = make_dataclass(section.__name__, [("extra", bool, field(default=False))], bases=(section,),
                              frozen=True, kw_only=True)
    name = section.__name__.removesuffix("Config").lower()
    old = getattr(BASE, name)
    values = {spec.name: getattr(old, spec.name) for spec in fields(old)}
    unchanged, changed = (dataclasses.replace(BASE, **{name: extended(**values, extra=extra)})
                          for extra in (False, True))
    assert both_digests(unchanged) == both_digests(BASE)
    assert digest(changed) != digest(BASE)


@dataclass(frozen=True, kw_only=True)
class ExtendedConfig(ExpertChoiceConfig):
    noise: float = 0.0
    order: str = field(default="score", metadata=INFERENCE)


class Extended(ExpertChoice):
    """Expert choice of a later release, with two more options."""

    Config = ExtendedConfig


@pytest.fixture
def later_release(monkeypatch):
    monkeypatch.setitem(config_module.BUILT_IN_ROUTERS, "expert_choice", f"{__name__}:Extended")
    resolve_router.cache_clear()
    yield
    resolve_router.cache_clear()


def test_a_new_router_option_changes_no_digest_until_it_is_used(later_release):
    later = run_config()
    assert isinstance(later.model.moe.router, ExtendedConfig)
    assert both_digests(later) == both_digests(BASE)
    assert digest(run_config({f"{ROUTER}.noise": 0.1}), scope="training") != digest(BASE, scope="training")
    sampled = run_config({f"{ROUTER}.order": "random"})
    assert digest(sampled, scope="training") == digest(BASE, scope="training") and digest(sampled) != digest(BASE)


def test_a_default_that_moves_keeps_its_digests_when_the_old_one_is_frozen(monkeypatch):
    moved = make_dataclass("TrainingConfig", [("weight_decay", float, field(default=0.1))], bases=(TrainingConfig,),
                           frozen=True, kw_only=True)
    monkeypatch.setattr(config_module, "_frozen_defaults", lambda: {"TrainingConfig": {"weight_decay": 0.0}})
    for weight_decay in (0.0, 0.1):
        old, new = (cls(batch_size=4, num_images=40, weight_decay=weight_decay) for cls in (TrainingConfig, moved))
        assert digest(old) == digest(new)


def test_every_default_that_a_digest_leaves_out_is_frozen():
    frozen = config_module._frozen_defaults()

    def missing(cls, section):
        for spec in fields(cls):
            hint = typing.get_type_hints(cls)[spec.name]
            nested = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
            for part in nested:
                yield from missing(part, part.__name__)
            has_default = spec.default is not dataclasses.MISSING
            if has_default and spec.metadata.get("scope") != "runtime" and spec.name not in frozen.get(section, {}):
                yield f"{section}.{spec.name}"
    routers = {options["kind"] for options in ROUTERS.values()}
    assert [*missing(RunConfig, "RunConfig"),
            *(name for kind in routers for name in missing(resolve_router(kind).Config, kind))] == []


def test_a_router_has_one_digest_whether_it_is_named_or_imported():
    imported = run_config({f"{ROUTER}.kind": config_module.BUILT_IN_ROUTERS["expert_choice"]})
    assert both_digests(imported) == both_digests(BASE)


def test_every_field_has_a_type_that_from_dict_checks():
    def hints(cls):
        for hint in typing.get_type_hints(cls).values():
            for part in typing.get_args(hint) or (hint,):
                yield from hints(part) if dataclasses.is_dataclass(part) else [part]
    routers = {resolve_router(options["kind"]).Config for options in ROUTERS.values()} | {RouterConfig}
    kinds = {kind for cls in (RunConfig, *routers) for kind in hints(cls)}
    plain = {kind for kind in kinds if not hasattr(kind, "__members__")}
    assert plain == {int, float, bool, str, type(None), Ellipsis}  # a list is tuple[float, ...]


def test_derived_sizes_follow_from_the_fields():
    model = model_config(input_size=16, mlp_ratio=3, learn_sigma=False, class_dropout_prob=0)
    assert (model.num_tokens, model.ffn_size, model.out_channels, model.null_label) == (64, 96, 3, None)
    assert (model_config().out_channels, model_config().null_label) == (6, 10)
    assert run_config().training.num_steps == 10
