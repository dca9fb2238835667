"""Every family of bases, by tiny models of its real classes: a domain of the mini benchmark from start to export."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mllm_keeplora.adapters.stored import past_of
from mllm_keeplora.config import BaseConfig, find_config, parse_config, read_yaml, shipped
from mllm_keeplora.data.collate import joined
from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.schema import Media
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.linalg import Basis
from mllm_keeplora.mini import write_mini_dcl
from mllm_keeplora.models import load_base
from mllm_keeplora.models.causal.decoding import greedy
from mllm_keeplora.models.causal.features import feature_sizes, prompt_features, rows_by_question
from mllm_keeplora.models.causal.parts import name_parts
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.system.files import read_tensors
from tests.support.families import FAMILIES, build_family
from tests.support.mixing import Given
from tests.support.tiny import tiny_config
from tests.unit.adapters.conftest import random_factors

# Bases whose own template has no end mark after an answer, or which have no template, name a style in their YAML.
STYLES = {"llava": "vicuna_v1", "vipllava": "vicuna_v1", "llava-onevision": "onevision"}
STYLES |= {"llava-next": "llava_mistral", "paligemma": "paligemma", "paligemma2": "paligemma"}
TILED = ("llava-next", "llava-onevision")  # a picture is cut into as many tiles as its shape asks for
PAD = 0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
# Linear layers of the language model where they are not Llama's; of the projector where they are not LLaVA's.
LANGUAGE = {
    "llava-phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "qwen3-vl-moe": set(ATTENTION),  # the experts are no linear layers
}
LLAVA = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
PROJECTOR = {
    "qwen2-vl": ("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    "qwen2.5-vl": ("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    "idefics3": ("model.connector.modality_projection.proj",),
    "smolvlm": ("model.connector.modality_projection.proj",),
    "paligemma": ("model.multi_modal_projector.linear",),
    "paligemma2": ("model.multi_modal_projector.linear",),
    "gemma3": (),  # one matrix that is no linear layer
    "mllama": ("model.multi_modal_projector",),
    "mistral3": ("model.multi_modal_projector.patch_merger.merging_layer", *LLAVA),
}
for family in ("qwen3-vl", "qwen3-vl-moe"):
    merger = ("model.visual.merger", "model.visual.deepstack_merger_list.0")
    PROJECTOR[family] = tuple(f"{each}.{layer}" for each in merger for layer in ("linear_fc1", "linear_fc2"))


@pytest.fixture(scope="module")
def remote_sensing(tmp_path_factory):
    """The mini benchmark's first domain, with a few records."""
    folder = tmp_path_factory.mktemp("mini")
    write_mini_dcl(folder, {"train": 12, "val": 2, "test": 6, "general": 2, "anchors": 2})
    return folder


# Their classes derive from, or are written alike to, those of a family that stays in the fast suite.
ALIKE = {"vipllava", "llava-phi3", "smolvlm", "paligemma", "qwen2-vl"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in FAMILIES],
)
def run(request, remote_sensing, tmp_path_factory):
    """A finished run over one domain on a tiny base of the family: gradient, train, consolidate, evaluate."""
    root = tmp_path_factory.mktemp("families")
    values = config_of(request.param, build_family(request.param, root / "base"), remote_sensing, root / "run")
    run_sequence(parse_config(values, origin="test"))
    return request.param, load_run(root / "run")


def config_of(family, base, mini, output):
    values = tiny_config(base, mini, output, train={"batch_size": 6}, eval={"batch_size": 3})
    part = {"train": f"{mini}/RS/train.json", "test": f"{mini}/RS/test.json"}
    values["benchmark"] = {"name": "rs", "defaults": {"scorer": "exact", "max_new_tokens": 3}, "domains": {"RS": part}}
    values["base"]["prompt"] = STYLES.get(family, "auto")
    if family == "qwen3-vl-moe":
        values["adapters"] = {"target": list(ATTENTION)}
    return values


def questions(saved, number=3):
    records = saved.benchmark.test_records("RS")[:number]
    return saved.base.prompt.question_batch(records, [images_of(record) for record in records])


def test_rows_that_leave_change_no_answer(run):
    """Half of the first tokens are taken for ends, so that rows leave at several steps."""
    _, saved = run
    model, batch = saved.restore(1), questions(saved, 6)
    length, options = batch["input_ids"].shape[1], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    free = model.generate(**batch, **options, eos_token_id=[PAD])[:, length:]
    ends = set(free[:3, 1].tolist()) | set(free[3:5, 3].tolist())
    expected = model.generate(**batch, **options, eos_token_id=list(ends))[:, length:]
    assert greedy(model, batch, 6, ends, PAD).tokens.tolist() == expected.tolist()


def conversations(saved, folder):
    """Four training records, one of them with a picture of another shape, and what makes inputs of records."""
    records = list(saved.benchmark.train_records("RS")[:4])
    Image.new("RGB", (200, 70), (200, 10, 10)).save(folder / "wide.png")
    records[1] = replace(records[1], media=(Media("image", folder / "wide.png"),))
    return records, saved.base.family.training_batch


def test_two_batches_put_together_are_the_batch_of_all_records(run, tmp_path):
    """So that records of earlier domains can join a batch."""
    records, collate = conversations(run[1], tmp_path)
    found = joined(collate(records[:1]), collate(records[1:]), run[1].base.prompt.tokenizer.pad_token_id)
    wanted = collate(records)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_what_gates_and_routers_see_of_a_question_does_not_depend_on_its_batch(run, tmp_path):
    family, saved = run
    records, collate = conversations(saved, tmp_path)
    if family == "mllama":
        with pytest.raises(UserError, match=r"strategy\.pictures=false"):
            prompt_features(saved.base.model, collate(records))
        return
    together = prompt_features(saved.base.model, collate(records))
    assert together.shape[1] == sum(feature_sizes(saved.base.model)) and together.isfinite().all()
    for row, record in enumerate(records):
        assert torch.allclose(prompt_features(saved.base.model, collate([record]))[0], together[row], atol=1e-5)


def test_each_question_is_answered_by_its_own_branch_whatever_its_company(run, tmp_path):
    """In the projector, too, which sees pictures, or as many tiles of them as their shape asks for."""
    family, saved = run
    records, collate = conversations(saved, tmp_path)
    mixer = Given(2, 4)
    mixer.table.data = torch.eye(2)[[0, 1, 1, 0]]
    saved.adapters.restore([random_factors(saved.base, seed) for seed in (1, 2)], [], mixer)
    batch = collate(records)
    saved.adapters.look_at(batch)
    together = logits(saved.adapters.model, batch)
    for row, record in enumerate(records):
        alone = collate([record])
        mixer.table.data[0] = torch.eye(2)[[0, 1, 1, 0][row]]
        saved.adapters.look_at(alone)
        found = logits(saved.adapters.model, alone)[0]
        assert torch.allclose(together[row, : len(found)], found, atol=1e-4), row
    saved.placed.invalidate()  # what the adapters hold now is no state of the run
    if family in TILED:  # not in proportion to image tokens, even where the sums would allow it
        spans = (batch["input_ids"] == saved.base.model.config.image_token_id).sum(dim=1)
        sizes = rows_by_question(saved.base.model, batch, int(spans.sum()))
        assert len(set((sizes / spans).tolist())) > 1


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_a_domain_is_learnt_outside_the_weights_principal_directions_and_exports_give_the_same_model(run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    family, saved = run
    parts, folder = saved.base.parts, saved.run.path / "domains/01_RS"
    assert {layer.rsplit(".", 1)[-1] for layer in parts.language_layers} == LANGUAGE.get(family, LLAMA)
    assert parts.projector_layers == PROJECTOR.get(family, LLAVA)
    [factors] = past_of(saved.run, saved.first(None)).factors
    assert set(factors.A) == set(parts.target_layers)
    for layer, columns in read_tensors(saved.run.kept_by_prepare).items():
        A = factors.A[layer]
        assert torch.allclose(A @ A.mT, torch.eye(len(A)), atol=1e-5), layer
        assert Basis.from_columns(columns).project(A).abs().max() < 1e-5, layer
    assert len((folder / "predictions/RS.jsonl").read_text().splitlines()) == 6

    batch = questions(saved)
    own, untouched = logits(saved.restore(1), batch), logits(saved.restore(0), batch)
    assert (own - untouched).abs().max() > 0.1
    export(saved, "merged", tmp_path / "merged")
    export(saved, "adapter", tmp_path / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(merged, batch), own, atol=1e-4)
    attn = saved.base.model.config._attn_implementation
    again = AutoModelForImageTextToText.from_pretrained(saved.config.base.model, attn_implementation=attn)
    adapted = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    assert torch.allclose(logits(adapted, batch), own, atol=1e-3)


def test_only_answers_and_their_end_carry_loss_and_later_tokens_change_no_earlier_logit(run):
    _, saved = run
    record = saved.benchmark.train_records("RS")[0]
    prompt, model = saved.base.prompt, saved.restore(0)
    batch = prompt.training_batch([record], [images_of(record)], None)
    labels = batch.pop("labels")
    told = prompt.tokenizer.decode(labels[labels != -100])
    for turn in record.turns:
        if turn.role == "assistant":
            assert turn.text in told
            told = told.replace(turn.text, "", 1)
    assert not any(turn.text in told for turn in record.turns if turn.role == "user")
    assert prompt.ends_answers(record)
    before = logits(model, batch)
    place = int((labels[0] != -100).nonzero()[-1])
    batch["input_ids"][0, place] = prompt.tokenizer.pad_token_id
    assert torch.allclose(logits(model, batch)[0, : place - 1], before[0, : place - 1], atol=1e-5)


def test_experts_in_one_tensor_are_refused_until_layers_are_named(tmp_path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(build_family("qwen3-vl-moe", tmp_path / "base"))
    with pytest.raises(UserError, match=r"experts\.gate_up_proj .* adapters\.target=\[q_proj"):
        name_parts(model, "keeplora")


def test_experts_are_not_made_larger_by_quantising_what_is_around_them(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = build_family("qwen3-vl-moe", tmp_path / "base")
    with pytest.raises(UserError, match="bitsandbytes does not quantise"):
        load_base(BaseConfig(model=str(folder), quantization="nf4"), "frozen", ())


def test_several_projector_modules_trained_in_full_leave_as_one_adapter(remote_sensing, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = build_family("qwen3-vl", tmp_path / "base")
    values = config_of("qwen3-vl", folder, remote_sensing, tmp_path / "run")
    values["adapters"] = {"projector": "full"}
    run_sequence(parse_config(values, origin="test"))
    saved = load_run(tmp_path / "run")
    export(saved, "adapter", tmp_path / "adapter")
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    batch = questions(saved)
    assert torch.allclose(logits(adapted, batch), logits(saved.restore(1), batch), atol=1e-3)


def test_records_with_and_without_pictures_are_told_apart_where_a_processor_cannot_batch_them(remote_sensing, tmp_path):
    from mllm_keeplora.checks.records import load_family, mixed_faults
    from mllm_keeplora.data import load_benchmark

    folder = build_family("mllama", tmp_path / "base")
    config = parse_config(config_of("mllama", folder, remote_sensing, tmp_path / "run"), origin="test")
    record = load_benchmark(config).train_records("RS")[0]
    bare, prompt = replace(record, media=()), load_family(BaseConfig(model=str(folder)), str(folder)).prompt
    alike, mixed = [record, record], [bare, record]
    for trained, graded, together, named in (
        ({"A": alike}, {"A": [bare]}, False, []),
        ({"A": alike, "B": mixed}, {"A": alike}, False, ["B"]),
        ({"A": alike}, {"A": mixed}, False, ["test of A"]),
        ({"A": alike, "B": [bare]}, {}, False, []),
        ({"A": alike, "B": [bare]}, {}, True, ["all domains together"]),
    ):
        faults = list(mixed_faults(trained, graded, prompt, None, together))
        assert [fault.split(" mixes records")[0] for fault in faults] == named
        assert all("this base cannot batch them" in fault for fault in faults)
        assert list(mixed_faults(trained, graded, None, 2, together)) == []
        assert len(list(mixed_faults(trained, graded, None, 3, together))) == len(named)


@pytest.mark.slow
def test_a_hub_base_is_known_by_its_revision(tmp_path):
    """Checkpoints in the hub's cache, as downloads leave them, loaded without network: the newest, or a run's own."""
    older, newer = ("0123456789abcdef" * 2 + end for end in ("01234567", "89abcdef"))
    repository = tmp_path / "models--org--tiny"
    for revision in (older, newer):
        build_family("llava", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(newer)
    code = (
        "from mllm_keeplora.config import BaseConfig; from mllm_keeplora.models import load_base\n"
        f"for known in (None, 'org/tiny@{older}', 'org/tiny@{newer}'):\n"
        "    base = load_base(BaseConfig(model='org/tiny', prompt='vicuna_v1'), 'frozen', known_as=known)\n"
        "    print('is', base.fingerprint)\n"
        "load_base(BaseConfig(model='org/tiny', prompt='vicuna_v1'), 'frozen', known_as='another')"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=900)
    found = [line.removeprefix("is ") for line in said.stdout.splitlines() if line.startswith("is ")]
    assert found == [f"org/tiny@{revision}" for revision in (newer, older, newer)], said.stderr
    assert "UserError: base.model 'org/tiny' has other weights than those that the run was started with" in said.stderr


def test_every_family_that_a_shipped_base_belongs_to_is_tried():
    """`architecture` in a base's YAML names the tiny model that stands for it here."""
    settings = {name: read_yaml(find_config("models", name)) for name in shipped("models")}
    families = {name: each.get("architecture") for name, each in settings.items() if each.get("family") != "dual"}
    assert set(families.values()) <= {*FAMILIES}, families
