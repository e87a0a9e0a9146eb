"""lm-evaluation-harness measures a running server by its own client, and finds what transformers itself gives."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from nr_serve.default_model import fetch_model

CHOICES = [
    {"context": "The capital of France is", "choices": ["Paris", "London", "the river Thames"], "gold": 0},
    {"context": "Water freezes at", "choices": ["zero degrees", "noon"], "gold": 0},
    {"context": "A fájl mentéséhez kattintson a", "choices": ["Mentés gombra", "table"], "gold": 0},
]
QUESTIONS = [{"question": "Once upon a time, there was"}, {"question": "The sun is"}]
LONGEST = 12


@pytest.fixture(scope="module")
def reference():
    folder = fetch_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def samples(url, tmp_path_factory):
    """By task, what the harness logged of each example."""
    place = tmp_path_factory.mktemp("tasks")
    _write(
        place,
        "choose",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_target="{{gold}}",
        doc_to_choice="{{choices}}",
    )
    generation = {"until": ["."], "max_gen_toks": LONGEST, "do_sample": False, "temperature": 0}
    _write(
        place,
        "write",
        QUESTIONS,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="",
        generation_kwargs=generation,
    )
    folder = fetch_model()
    model = f"model={folder.name},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={folder}"
    command = [
        "--model",
        "local-completions",
        "--model_args",
        f"{model},num_concurrent=2",
        "--tasks",
        "choose,write",
    ]
    command += ["--include_path", str(place), "--log_samples", "--output_path", str(place / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logged = {name: next((place / "out").rglob(f"samples_{name}_*.jsonl")) for name in ("choose", "write")}
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in logged.items()}


def _write(place, name, rows, **task):
    data = place / f"{name}.data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task |= {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"test_split": "test", "metric_list": [{"metric": "acc" if name == "choose" else "exact_match"}]}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def test_log_likelihoods_are_those_of_transformers(samples, reference):
    model, tokenizer = reference
    assert len(samples["choose"]) == len(CHOICES)
    for sample in samples["choose"]:
        row = sample["doc"]
        context = tokenizer(row["context"])["input_ids"]
        for choice, (found, greedy) in zip(row["choices"], sample["filtered_resps"], strict=True):
            ids = tokenizer(f"{row['context']} {choice}")["input_ids"]
            assert ids[: len(context)] == context
            with torch.no_grad():
                logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scored = range(len(context), len(ids))
            expected = sum(float(logprobs_TV[t - 1, ids[t]]) for t in scored)
            assert float(found) == pytest.approx(expected, abs=1e-3)
            assert (greedy in (True, "True")) == all(int(logprobs_TV[t - 1].argmax()) == ids[t] for t in scored)


def test_written_answers_are_those_of_transformers(samples, reference):
    model, tokenizer = reference
    assert len(samples["write"]) == len(QUESTIONS)
    for sample in samples["write"]:
        ids = tokenizer(sample["doc"]["question"], return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=LONGEST, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected = tokenizer.decode(written, skip_special_tokens=True).split(".")[0]
        assert sample["resps"] == [[expected]]
