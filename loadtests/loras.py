"""Random LoRAs for a base, as PEFT writes them: what another server carries in place of our adapters.

    python loadtests/loras.py --out loras hu da sk bio

Rank 22 on every linear layer of the default base is 6.7 million parameters, as an adapter of 5% has. What they
compute is of no use; only what they cost is. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nr_serve.default_model import model_folder

SPREAD = 0.01
"""Standard deviation of B's numbers: enough to change what is answered, too little to break it."""


def main(argv: list[str] | None = None) -> None:
    """Write a folder for each name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder for each")
    parser.add_argument("--base", default="default")
    parser.add_argument("--rank", type=int, default=22)
    args = parser.parse_args(argv)
    base = AutoModelForCausalLM.from_pretrained(model_folder(args.base), local_files_only=True)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    drawn = {name: part for name, part in model.named_parameters() if part.requires_grad}
    for number, name in enumerate(args.names):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, part in drawn.items():
                spread = SPREAD if "lora_B" in key else part.shape[1] ** -0.5
                part.copy_(spread * torch.randn(part.shape, generator=generator))
        model.save_pretrained(args.out / name)
    print(json.dumps({"parameters": sum(part.numel() for part in drawn.values()), "names": args.names}))


if __name__ == "__main__":
    main()
