"""Pretrain a small Llama on text of yours, as a base to try methods on where no model hub is reachable.

    python examples/pretrain_small_llama.py --out FOLDER --text input.txt ... [--steps 600]
        [--activation silu]

Trains a byte-pair tokenizer and a Llama (4 layers, hidden 192, grouped queries, gated MLP; 2.0 million parameters) from
nothing, with lightning_peft.models.CausalLM. FOLDER is a plain transformers folder, tokenizer included, for
`--model.init_args.model FOLDER` or `AutoModelForCausalLM.from_pretrained`. A .json or .jsonl file gives the text of
all its strings.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lightning_peft.data import TextBlocks
from lightning_peft.models import CausalLM

END = "<end>"
CONFIG = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
          "intermediate_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True}  # fmt: skip


def strings(value: Any) -> Iterator[str]:
    """All strings in what a JSON file holds, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return "\n".join(s for line in text.splitlines() if line.strip() for s in strings(json.loads(line)))
    return "\n".join(strings(json.loads(text))) if path.suffix == ".json" else text


def start(text: Path, folder: Path, vocabulary: int, activation: str) -> None:
    """Write a tokenizer trained on ``text``, and the config of a Llama for it."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(text)], vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder)
    end = int(tokenizer.convert_tokens_to_ids(END))  # pyright: ignore[reportArgumentType]
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, hidden_act=activation,
                **CONFIG).save_pretrained(folder)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--activation", default="silu", help="of the MLPs' gates; relu makes exact zeros")
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    seed_everything(0)
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n".join(text_of(path) for path in options.text), encoding="utf-8")
        start(text, options.out, options.vocabulary, options.activation)
        folder = str(options.out)
        data = TextBlocks(folder, train=str(text), block_size=128, batch_size=16, val_fraction=0.02)
        model = CausalLM(folder, learning_rate=2e-3, weight_decay=0.1, pretrained=False, sample_prompts=["How many"])
        trainer = Trainer(max_steps=options.steps, max_epochs=-1, precision=options.precision, logger=False,
                          enable_checkpointing=False, val_check_interval=options.steps, check_val_every_n_epoch=None,
                          default_root_dir=scratch)  # fmt: skip
        trainer.fit(model, data)
    model.model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
