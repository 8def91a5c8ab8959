"""The nearest name to one that is unknown: what other trainers call the same thing, or else what is spelt like it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

_ELSEWHERE = {
    "lr": "learning_rate max_lr peak_lr",
    "warmup": "warmup_steps lr_warmup_iters num_warmup_steps warmup_iters warmup_ratio",
    "min_lr_ratio": "min_lr final_lr lr_min",
    "weight_decay": "wd",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon adam_eps epsilon",
    "clip": "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip_val gradient_clipping",
    "steps": "max_steps train_iters max_iters num_steps iterations epochs num_epochs num_train_epochs max_epochs",
    "microbatch_size": "batch_size micro_batch_size mbs per_device_train_batch_size train_batch_size "
    "train_micro_batch_size_per_gpu",
    "microbatches": "gradient_accumulation_steps grad_accum accumulate num_microbatches global_batch_size gbs",
    "sequence_length": "seq_length seq_len max_seq_length max_seq_len max_length block_size context_length "
    "model_max_length",
    "dtype": "precision bf16 fp16 mixed_precision torch_dtype",
    "recompute": "gradient_checkpointing activation_checkpointing recompute_activations",
    "compile": "torch_compile use_compile compile_model",
    "model": "model_name_or_path model_name checkpoint pretrained hf_path",
    "data": "dataset dataset_name train_file train_data data_path data_dir",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_type",
    "vocabulary": "vocab_size",
    "held_out": "validation_split val_split test_size",
    "out": "output_dir output save_dir save run_dir",
    "checkpoint_every": "save_steps save_interval save_every checkpoint_interval ckpt_interval",
    "keep": "save_total_limit keep_last keep_latest_k",
    "evaluate_every": "eval_steps eval_interval eval_every",
    "evaluate_samples": "eval_iters eval_samples",
    "resume": "resume_from_checkpoint load restart",
    "workers": "pp pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel_degree nproc_per_node "
    "num_workers world_size gpus num_gpus",
    "replicas": "dp data_parallel_size data_parallel_degree",
    "chunks": "virtual_stages num_layers_per_virtual_pipeline_stage virtual_pipeline_model_parallel_size",
    "nodes": "nnodes num_nodes",
    "store": "master_addr rdzv_endpoint",
    "store_port": "master_port",
    "lora_rank": "lora_r lora_dim",
    "lora_targets": "lora_target_modules target_modules",
    "lora_blocks": "layers_to_transform lora_layers",
    "trained": "trainable_params_regex trainable_parameters unfrozen_parameters",
    "tokens": "max_new_tokens max_tokens num_tokens",
    "samples": "limit num_samples",
    "one_f_one_b": "1f1b onefoneb pipedream pipedream_flush",
    "interleaved": "interleaved_1f1b 1f1b_interleaved interleaved1f1b looped vpp",
    "zero_bubble": "zb zb_h1 zbh1 zb1p zerobubble interleavedzerobubble",
    "balanced": "zbv zb_v zbvzerobubble dualpipe dualpipev",
    "gpipe": "fill_drain",
}
"""Ours -> the names of other trainers for the same, or for what it is reached by."""


def nearest(name: str, allowed: Collection[str]) -> str | None:
    """The one of `allowed` that is meant by `name`, if one seems to be."""
    plain = _plain(name)
    for ours, theirs in _ELSEWHERE.items():
        if ours in allowed and plain in theirs.split():
            return ours
    spelt = {_plain(each): each for each in allowed}
    close = get_close_matches(plain, spelt, n=1, cutoff=0.6)
    return spelt[close[0]] if close else None


def did_you_mean(name: str, allowed: Iterable[str], before: str = "") -> str:
    """ " (did you mean X?)", or nothing where no name is near; `before` goes before X."""
    found = nearest(name, tuple(allowed))
    return "" if found is None else f" (did you mean {before}{found.replace('_', '-') if before else found}?)"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
