"""What `train.args` may hand to the Trainer, and what the sequence sets itself."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import TrainingArguments

from mllm_keeplora.config import TrainConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.training.arguments import OWNED, training_arguments

PASSED = """
    adam_beta1 adam_beta2 adam_epsilon batch_eval_metrics bf16_full_eval dataloader_multiprocessing_context
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph debug disable_tqdm do_eval do_predict do_train
    eval_accumulation_steps eval_delay eval_do_concat_batches eval_steps eval_strategy eval_use_gather_object
    fp16_full_eval full_determinism greater_is_better include_for_metrics include_num_input_tokens_seen
    length_column_name liger_kernel_config load_best_model_at_end log_level log_level_replica log_on_each_node
    logging_first_step logging_nan_inf_filter logging_strategy lr_scheduler_kwargs max_steps metric_for_best_model
    neftune_noise_alpha optim optim_args optim_target_modules per_device_eval_batch_size prediction_loss_only project
    report_to run_name save_strategy skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id use_cache use_liger_kernel
    warmup_steps
""".split()  # noqa: SIM905
KNOWN = Version("5.24")  # has these; older trainers have fewer, and two that are gone
FIELDS = sorted(field.name for field in dataclasses.fields(TrainingArguments))
OWN = sorted(name for name in FIELDS if any(fnmatchcase(name, pattern) for pattern in OWNED))


def arguments(**args) -> TrainingArguments:
    return training_arguments(TrainConfig(args=args), 1.0, Path("out"), 0, None, bf16=False)


def test_every_argument_of_the_installed_trainer_is_decided_on():
    passed = {*FIELDS} - {*OWN}
    if Version(transformers.__version__) < KNOWN:
        assert passed <= {*PASSED, "logging_dir", "warmup_ratio"}
    else:
        assert sorted(passed) == sorted(PASSED)
        assert all(any(fnmatchcase(name, pattern) for name in FIELDS) for pattern in OWNED), "a pattern of nothing"


@pytest.mark.parametrize("name", OWN)
def test_what_the_sequence_sets_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf"train.args.{name} is 1, but the sequence itself sets that: "):
        arguments(**{name: 1})


def test_all_are_told_at_once_and_name_the_key_to_use():
    with pytest.raises(UserError) as refused:
        arguments(push_to_hub=True, hub_model_id="me/mine", output_dir="/elsewhere", num_train_epochs=9, adam_beta2=0.9)
    first, second, third, fourth = refused.value.sentences
    assert "train.args.push_to_hub" in first and "a training uploads nothing" in first
    assert "train.args.hub_model_id is 'me/mine'" in second
    assert third.endswith("use output") and fourth.endswith("use train.epochs")


@pytest.mark.parametrize("value", ["all", ["all"], ["tensorboard", "all"]])
def test_telling_whatever_is_installed_is_refused(value):
    with pytest.raises(UserError, match=r"train.args.report_to is 'all'"):
        arguments(report_to=value)


def test_everything_else_passes_and_nothing_is_told_to_others_by_itself():
    made = arguments(adam_beta2=0.9, max_steps=3, warmup_steps=2)
    assert (made.adam_beta2, made.max_steps, made.warmup_steps) == (0.9, 3, 2)
    assert made.report_to == [] and not made.push_to_hub
