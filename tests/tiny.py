"""Tiny random models and adapters, and the naive loop that every fast path is held against."""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from nr_serve.neutral import math
from nr_serve.neutral.format import Adapter, AdapterInfo, Block
from nr_serve.neutral.host import fingerprint, host_blocks
from nr_serve.tokenizer import Tokenizer
from nr_serve.train.text.pack import Windows

VOCAB = 300
D = 48
LAYERS = 3


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: 256 bytes, then named tokens up to VOCAB."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {f"<{i}>": i for i in range(len(alphabet), VOCAB)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<299>", chat_template=template)
    return Tokenizer(fast)


def model(kind: str = "llama", *, seed: int = 0, **overrides):
    """A random model of one of transformers' classes, float32."""
    common = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": 299,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    config = AutoConfig.for_model(kind, **(common | overrides))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().eval()


def adapter(
    base,
    seed: int,
    *,
    carry: float = 0.0,
    h: int = 16,
    scale: float = 2.0,
    threshold: float = 0.0,
    gate: str = "relu",
    bare_layers: Sequence[int] = (),
) -> Adapter:
    """A random adapter whose gates open on about half the tokens; its last layer is narrower."""
    g = torch.Generator().manual_seed(seed)
    d = base.get_input_embeddings().embedding_dim

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    blocks = []
    for i in range(LAYERS):
        width = h if i < LAYERS - 1 else h // 2
        blocks.append(
            Block(
                gate=rand(d) / d**0.5,
                bias=torch.zeros(()),
                w_in=rand(width, d) / d**0.5,
                w_gate=rand(width, d) / d**0.5,
                w_out=scale * rand(d, width) / width**0.5,
            )
        )
    info = AdapterInfo(
        base="tiny",
        base_fingerprint=fingerprint(base, tokenizer().hf),
        layers=LAYERS,
        d=d,
        carry=carry,
        threshold=threshold,
        gate=gate,
        domain=f"test-{seed}",
    )
    blocks = [None if i in bare_layers else block for i, block in enumerate(blocks)]
    # Measurements are kept by it: those of another adapter must not be taken for this one's.
    changed = {"carry": carry, "h": h, "scale": scale, "threshold": threshold, "gate": gate, "bare": bare_layers}
    usual = {"carry": 0.0, "h": 16, "scale": 2.0, "threshold": 0.0, "gate": "relu", "bare": ()}
    version = " ".join([f"v{seed}", *(f"{key}={value}" for key, value in changed.items() if value != usual[key])])
    nbytes = sum(t.nbytes for b in blocks if b for t in (b.gate, b.bias, b.w_in, b.w_gate, b.w_out))
    return Adapter(info=info, blocks=tuple(blocks), version=version, nbytes=nbytes)


class Naive:
    """One request at a time, the whole sequence at every step, residues by `math.py` alone."""

    def __init__(self, base) -> None:
        self.model = copy.deepcopy(base)
        host_blocks(self.model, self._add)
        self._adapters: Sequence[Adapter] = ()

    def _add(self, layer, x, y):
        for each in self._adapters:
            block = each.blocks[layer]
            if block is None:
                continue
            z = math.gate_logit(x[0], block.gate, block.bias)
            m = math.carry(z, each.info.carry)
            g = math.block_gate(m, each.info.threshold, each.info.ceiling)
            y = y + math.residue(x[0], g, block.w_in, block.w_gate, block.w_out)[None]
        return y

    @torch.no_grad()
    def logits(self, ids: Sequence[int], adapters: Sequence[Adapter] = ()) -> torch.Tensor:
        """[T, V]."""
        self._adapters = adapters
        return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    def greedy(self, prompt: Sequence[int], tokens: int, adapters: Sequence[Adapter] = ()):
        """Greedy answer and, for each of its tokens, the log probabilities it was chosen from."""
        ids, chosen_from = list(prompt), []
        for _ in range(tokens):
            logprobs = self.logits(ids, adapters)[-1].log_softmax(-1)
            chosen_from.append(logprobs)
            ids.append(int(logprobs.argmax()))
        return ids[len(prompt) :], chosen_from


def naive_loss(logits: Callable[[list[int]], torch.Tensor], text: Windows) -> float:
    """Nats per token of a text, document by document; `logits` gives [T, V] for the tokens of one."""
    nats, count = 0.0, 0
    for ids, offset in zip(text.ids_NT.tolist(), text.offset_NT.tolist(), strict=True):
        starts = [t for t, place in enumerate(offset) if place == 0] + [len(ids)]
        for first, last in itertools.pairwise(starts):
            logprobs = logits(ids[first:last]).log_softmax(-1)
            nats -= float(logprobs[:-1].gather(1, torch.tensor(ids[first + 1 : last])[:, None]).sum())
            count += last - first - 1
    return nats / count


def answer(prompt: str, tokens: int, *adapters: Adapter) -> list[int]:
    """Greedy answer of the usual base to a text."""
    return Naive(model()).greedy(tokenizer().encode(prompt, special_tokens=False), tokens, adapters)[0]


def save(base, folder: Path) -> Path:
    """A model folder as `--model` takes it."""
    base.save_pretrained(folder)
    tokenizer().hf.save_pretrained(folder)
    return folder
